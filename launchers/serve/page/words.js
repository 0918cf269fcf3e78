// Small things that several modules need.

/** `document.getElementById`, by a short name. */
export const find = (id) => document.getElementById(id);

/** Sets a text, and touches the page only where it differs, so that screen readers hear each once. */
export function fill(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** 2.1 s */
export function seconds(value) {
  return `${Math.max(0, value).toFixed(1)} s`;
}

/** 12 MB */
export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

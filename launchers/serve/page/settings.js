// The form of a session that is still to be started, and what else the server offers to choose from.

import { fill, find, megabytes, plural, seconds } from "./words.js";

const NUMBERS = ["num_frames", "fps", "seed", "num_inference_steps", "guidance_scale", "lead"];
const TEXTS = ["negative_prompt", "lora", "api_key"];
const STEPS = "pyramid_num_inference_steps_list";

export class Settings {
  #form;
  #server = null;

  constructor(form) {
    this.#form = form;
    form.addEventListener("input", () => this.#describeLength());
  }

  /** Draws the form for a server; what it does not name is not shown. */
  show(server) {
    if (this.#server) return;
    this.#server = server;
    const { defaults = {}, limits = {}, loras = [] } = server;
    for (const name of [...NUMBERS, STEPS, "negative_prompt"]) this.#offer(name, name in defaults, defaults[name]);
    const own = [defaults.width, defaults.height];
    const sizes = [...(limits.sizes ?? [])];
    if (defaults.width && !sizes.some((size) => size.join() === own.join())) sizes.unshift(own);
    this.#choices("size", sizes.map((size) => [size.join("x"), size.join(" × ")]), own.join("x"));
    this.#choices("lora", [["", "none"], ...loras.map((name) => [name, name])], "");
    this.#offer("lora", loras.length > 0);
    this.#offer("api_key", Boolean(server.key_required));
    this.#describeLength();
  }

  get isValid() {
    return this.#form.reportValidity();
  }

  /** The server wants a key, or another one. */
  askKey() {
    this.#offer("api_key", true);
    this.#form.elements.api_key.focus();
  }

  /** The fields of `session.start` that were chosen. */
  read() {
    const values = {};
    const fields = this.#form.elements;
    for (const name of NUMBERS) if (isGiven(fields[name])) values[name] = fields[name].valueAsNumber;
    if (isGiven(fields[STEPS])) values[STEPS] = fields[STEPS].value.trim().split(/[\s,]+/).map(Number);
    for (const name of TEXTS) if (isGiven(fields[name])) values[name] = fields[name].value;
    if (isGiven(fields.size)) [values.width, values.height] = fields.size.value.split("x").map(Number);
    return values;
  }

  #offer(name, isOffered, value) {
    const field = this.#form.elements[name];
    field.closest(".field").hidden = !isOffered;
    if (value != null) field.value = Array.isArray(value) ? value.join(" ") : value;
  }

  #choices(name, options, chosen) {
    const field = this.#form.elements[name];
    field.replaceChildren(...options.map(([value, label]) => new Option(label, value, false, value === chosen)));
    field.closest(".field").hidden = !options.length;
  }

  #describeLength() {
    const { num_frames: frames, fps } = this.#form.elements;
    const chunk = this.#server?.chunk_frames ?? 33;
    const chunks = Math.ceil(frames.valueAsNumber / chunk);
    const rate = fps.valueAsNumber || 24;
    const most = this.#server?.limits?.seconds;
    const endless = `until you stop it${most ? `, at most ${most} s` : ""}`;
    fill(find("length"), chunks > 0 ? `${plural(chunks, "chunk")}, ${seconds((chunks * chunk) / rate)}` : endless);
  }
}

function isGiven(field) {
  return !field.closest(".field").hidden && field.value.trim() !== "";
}

/** A picture or clip to start from: chosen, dropped or pasted. */
export class StartFile {
  #file = null;
  #complain;
  #most = Infinity;

  constructor(complain) {
    this.#complain = complain;
    find("file").addEventListener("change", (event) => this.take(event.target.files[0]));
    find("file-remove").addEventListener("click", () => this.clear());
    document.addEventListener("paste", (event) => this.#offered(event, event.clipboardData));
    for (const name of ["dragenter", "dragover"]) {
      document.addEventListener(name, (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        document.body.classList.toggle("is-dropping", this.isOpen);
      });
    }
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) document.body.classList.remove("is-dropping");
    });
    document.addEventListener("drop", (event) => {
      document.body.classList.remove("is-dropping");
      this.#offered(event, event.dataTransfer);
    });
  }

  /** Whether a session is still to be started. */
  isOpen = true;

  set most(bytes) {
    this.#most = bytes ?? Infinity;
  }

  take(file) {
    if (!file) return;
    const kind = file.type.split("/")[0];
    if (kind !== "image" && kind !== "video") return this.#complain(`${file.name} is neither a picture nor a clip.`);
    if (file.size > this.#most) {
      return this.#complain(`${file.name} has ${megabytes(file.size)}; at most ${megabytes(this.#most)} are taken here.`);
    }
    this.clear();
    this.#file = file;
    const preview = find(`file-${kind}`);
    preview.src = URL.createObjectURL(file);
    preview.hidden = false;
    fill(find("file-name"), file.name);
    find("file-chosen").hidden = false;
  }

  clear() {
    this.#file = null;
    find("file").value = "";
    find("file-chosen").hidden = true;
    for (const preview of [find("file-image"), find("file-video")]) {
      if (preview.src) URL.revokeObjectURL(preview.src);
      preview.removeAttribute("src");
      preview.hidden = true;
    }
  }

  /** `{image}` or `{video}` as a data URL, or nothing. */
  async read() {
    if (!this.#file) return {};
    const reader = new FileReader();
    const read = new Promise((resolve, reject) => {
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new Error(`${this.#file.name} cannot be read: ${reader.error.message}`));
    });
    reader.readAsDataURL(this.#file);
    return { [this.#file.type.split("/")[0]]: await read };
  }

  #offered(event, data) {
    const file = data?.files[0];
    if (!file) return;
    event.preventDefault();
    if (this.isOpen) this.take(file);
  }
}

/** Prompts to begin with; `pick` is called with the one that is clicked. */
export function showSamples(prompts, pick) {
  if (find("samples").childElementCount) return;
  for (const text of prompts.slice(0, 4)) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => pick(text));
    item.append(button);
    find("samples").append(item);
  }
}

/** Over how many chunks a new prompt may take over. */
export function showTransitions({ defaults, limits, chunk_frames: frames }) {
  const select = find("transition");
  if (select.length) return;
  const one = frames && defaults?.fps ? frames / defaults.fps : null;
  for (let chunks = 1; chunks <= Math.min(8, limits?.transition_chunks ?? 8); chunks++) {
    const label = chunks === 1 ? "at once" : `over ${chunks} chunks${one ? ` (${seconds(chunks * one)})` : ""}`;
    select.add(new Option(label, chunks, false, chunks === (defaults?.transition_chunks ?? 1)));
  }
}

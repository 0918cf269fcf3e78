// What the server offers beside the settings: sample prompts, and lengths of a transition.

import { find, seconds } from "./words.js";

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

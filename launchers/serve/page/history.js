// The prompts of a session, newest first, each with what became of it.

import { fill, seconds } from "./words.js";

const WIDTH = 160; // Pixels of a thumbnail, which is shown half as wide on most screens.

export class History {
  #list;
  #template;
  #actions;
  #rows = new Map(); // Change -> its row.
  #canvas = document.createElement("canvas");

  /**
   * @param {{reuse: (prompt: string) => void, announce: (text: string) => void}} actions with a prompt that was picked;
   *   to those who listen
   */
  constructor(list, template, actions) {
    this.#list = list;
    this.#template = template;
    this.#actions = actions;
  }

  clear() {
    this.#rows.clear();
    this.#list.replaceChildren();
  }

  show(session) {
    for (const change of session.changes) {
      const row = this.#rows.get(change) ?? this.#add(change);
      const text = describe(change, session);
      fill(row.querySelector(".change-state"), text);
      // Once a state, because the seconds count down.
      const isNew = row.dataset.state !== change.state && change.state !== "sent";
      if (isNew) this.#actions.announce(`${change.prompt}: ${text}`);
      row.dataset.state = change.state;
    }
  }

  /** Keeps the picture on screen as that of a prompt. It is in the change, so that a reload has it too. */
  picture(change, video) {
    if (!video.videoWidth) return;
    const canvas = this.#canvas;
    canvas.width = WIDTH;
    canvas.height = Math.round((WIDTH * video.videoHeight) / video.videoWidth);
    canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
    change.picture = canvas.toDataURL("image/jpeg", 0.7); // Some 4 kB.
    this.#draw(change);
  }

  #add(change) {
    const row = this.#template.content.firstElementChild.cloneNode(true);
    fill(row.querySelector(".change-prompt"), change.prompt);
    row.querySelector("button").addEventListener("click", () => this.#actions.reuse(change.prompt));
    this.#list.prepend(row);
    this.#rows.set(change, row);
    this.#draw(change);
    return row;
  }

  #draw(change) {
    const image = this.#rows.get(change)?.querySelector("img");
    if (!image || !change.picture) return;
    image.src = change.picture;
    image.hidden = false;
  }
}

/** What became of a change, in words. */
export function describe(change, session) {
  const over = change.transition > 1 ? `, over ${change.transition} chunks` : "";
  switch (change.state) {
    case "sent":
      return "Sent";
    case "received":
      return change.isReset ? "Received: a new start" : "Received";
    case "coming": {
      const chunk = session.chunks.get(change.chunk);
      const applies = `Received. Applies from chunk ${change.chunk}`;
      if (session.state === "paused" && !chunk) return `${applies}, which a step or resume makes`;
      const wait = chunk ? chunk.media_time - session.time : (change.due - Date.now()) / 1000;
      return `${applies}${wait > 0.05 ? ` (in ${seconds(wait)})` : ""}${over}`;
    }
    case "shown":
      if (change.isSeen) return `On screen from chunk ${change.chunk}`;
      const since = change.id ? "it was sent" : "the start";
      return `On screen from chunk ${change.chunk}, ${seconds(change.took)} after ${since}${over}`;
    case "replaced":
      return "Replaced by the next one before it was shown";
    case "refused":
      return `Refused: ${change.why}`;
  }
}

// A strip of the chunks around the one on screen: played, on screen, made, to come, and where a prompt changes.

const BEFORE = 5;
const AFTER = 4;

export class Strip {
  #cells;

  constructor(element) {
    this.#cells = Array.from({ length: BEFORE + 1 + AFTER }, () => {
      const cell = document.createElement("li");
      const bar = document.createElement("span");
      const number = document.createElement("small");
      bar.append(document.createElement("i"));
      cell.append(bar, number);
      element.append(cell);
      return { cell, fill: bar.firstChild, number };
    });
  }

  show(session) {
    const current = session.chunkOnScreen;
    const here = current?.chunk ?? 0;
    const first = Math.max(0, here - BEFORE);
    const isPlaced = ({ state }) => state === "coming" || state === "shown";
    const changes = new Set(session.changes.filter(isPlaced).map(({ chunk }) => chunk));
    this.#cells.forEach(({ cell, fill, number }, i) => {
      const chunk = first + i;
      cell.dataset.state = this.#state(chunk, here, current, session);
      cell.classList.toggle("has-change", changes.has(chunk));
      const part = chunk === here && current ? Math.min(1, (session.time - current.media_time) / current.duration) : 0;
      fill.style.transform = `scaleX(${part})`;
      if (number.textContent !== String(chunk)) number.textContent = chunk;
    });
  }

  #state(chunk, here, current, session) {
    if (current && chunk === here) return "now";
    if (chunk < here) return "played";
    if (chunk <= session.newest) return "made";
    const isMaking = chunk === session.newest + 1 && session.state === "running";
    return isMaking ? "making" : "coming";
  }
}

// The prompts of a session, and what becomes of each.

export class Changes {
  /**
   * Oldest first. Each is {id, prompt, transition, state, chunk, whole, isMade, due, sent, took, isReset, isSeen,
   * picture}, where `state` is sent, received (a first prompt, whose chunk is not known yet), coming, shown, replaced or
   * refused; `whole`: the chunk that ends its transition, until that is on screen; `isMade`: a chunk here shows it;
   * `isSeen`: another user gave it; `picture`: its thumbnail, as a data URL. The prompt of a start has no id.
   */
  list;

  constructor(list = []) {
    this.list = list;
  }

  add(change) {
    const added = { id: null, transition: 1, state: "sent", sent: Date.now(), ...change };
    this.list.push(added);
    return added;
  }

  /** Those that no chunk has begun to show: after a lost connection they are asked for again, by the same id. */
  get open() {
    return this.list.filter(({ id, state, isMade }) => id && ["sent", "coming"].includes(state) && !isMade);
  }

  /** The server has taken a start. */
  received() {
    for (const change of this.list) if (!change.id && change.state === "sent") change.state = "received";
  }

  /** The server's receipt: the first chunk that can show it. Latest wins: what no chunk showed yet never will be. */
  promised(id, chunk, seconds) {
    for (const change of this.list) {
      if (change.id === id) Object.assign(change, { state: "coming", chunk, due: Date.now() + seconds * 1000 });
      else if (change.state === "coming" && change.chunk >= chunk) change.state = "replaced";
    }
  }

  /** Returns whether there is such a change. */
  refused(id, why) {
    const change = this.list.find((each) => each.id && each.id === id);
    if (change) Object.assign(change, { state: "refused", why });
    return Boolean(change);
  }

  /** A chunk is here, and says which changes it is the first to show. */
  made({ chunk, started, completed, is_reset }) {
    for (const change of this.list) {
      if (change.id && change.transition > 1 && completed?.includes(change.id)) change.whole = chunk;
      const isFirst = !change.id && ["sent", "received"].includes(change.state) && (!change.isReset || is_reset);
      if (isFirst || (change.id && started?.includes(change.id))) {
        if (change.state !== "shown") change.state = "coming";
        Object.assign(change, { chunk, isMade: true });
      }
    }
  }

  /** A viewer learns of prompts by the chunks that show them. */
  seen({ chunk, prompt }) {
    if (!prompt || prompt === this.list.at(-1)?.prompt) return;
    this.add({ prompt, state: "coming", chunk, isMade: true, isSeen: true });
  }

  /** A chunk is on screen. Returns the changes that it is the first to show, or to show alone. */
  shown(number) {
    const shown = this.list.filter(({ state, isMade, chunk }) => state === "coming" && isMade && chunk <= number);
    for (const change of shown) Object.assign(change, { state: "shown", took: (Date.now() - change.sent) / 1000 });
    const whole = this.list.filter((change) => change.whole <= number);
    for (const change of whole) delete change.whole;
    return [...shown, ...whole];
  }
}

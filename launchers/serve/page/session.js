// What is known of a session: its chunks, its prompts, its state. Whoever shows it is told that something changed.

import { Changes } from "./changes.js";
import { Connection } from "./connection.js";
import { Player } from "./player.js";

const MOST_CHUNKS = 400; // What is remembered of chunks; older ones are played and gone.

/** A path of this server; relative, so that a proxy may put the server under any prefix. */
export function address(path, scheme = location.protocol) {
  const url = new URL(path, new URL("./", location.href));
  url.protocol = scheme;
  return url.href;
}

export class Session {
  state = "connecting"; // connecting, queued, running, paused, done
  link = { state: "connecting" };
  doing = ""; // What the server says that it is doing.
  queue = null; // {position, length}
  why = ""; // Why it is done.
  id = null;
  viewToken = null;
  configuration = {};
  seconds = 0; // Of a chunk.
  chunks = new Map(); // Number -> what the server said of it, with `arrived`.
  newest = -1; // Number of the newest chunk here.
  made = 0; // Frames a second at which the newest chunk was made.
  lag = null; // Seconds from the arrival of the chunk on screen to its first picture on screen.

  #changes = new Changes();
  #controlToken = null;
  #hello;
  #connection;
  #player;
  #tell;
  #complain;
  #onScreen = -1;
  #isAttached = false; // The server knows on this connection which session is meant.
  #rebuilds = [];

  /**
   * @param {HTMLVideoElement} video
   * @param {() => void} changed something here is different
   * @param {(text: string, code?: string) => void} complain to the user
   * @param {(is: boolean) => void} blocked the browser plays after a click alone
   */
  constructor(video, changed, complain, blocked) {
    this.#tell = changed;
    this.#complain = complain;
    this.#player = new Player(video, {
      skipped: (seconds) => complain(`${seconds.toFixed(1)} s of video did not come, and were jumped over.`),
      broken: (why) => this.#rebuild(why),
      blocked,
    });
  }

  get isController() {
    return this.#controlToken !== null || this.#hello?.type === "session.start";
  }

  /** Whether the connection is gone, and is tried again. */
  get isLost() {
    return this.link.state === "lost";
  }

  get hasEnded() {
    return this.state === "done";
  }

  /** Prompts, oldest first, and what becomes of each. */
  get changes() {
    return this.#changes.list;
  }

  /** What it takes to come back to this session after a reload. */
  get memory() {
    return this.#controlToken && { id: this.id, token: this.#controlToken, changes: this.changes.slice(-50) };
  }

  get viewersLink() {
    return `${address("")}#watch=${encodeURIComponent(this.id)}&token=${encodeURIComponent(this.viewToken)}`;
  }

  get time() {
    return this.#player.time;
  }

  get lead() {
    return this.#player.lead;
  }

  /** The chunk on screen. */
  get chunkOnScreen() {
    return this.chunks.get(this.#onScreen);
  }

  start(request) {
    this.#hello = { type: "session.start", format: "m4s", ...request };
    this.#changes.add({ prompt: request.prompt });
    this.#connect();
  }

  attach({ id, token, changes }) {
    this.id = id;
    this.#controlToken = token;
    this.#changes = new Changes(changes);
    this.#connect();
  }

  watch(id, token) {
    this.id = id;
    this.viewToken = token;
    this.#connect();
  }

  change(prompt, transition) {
    const id = `change-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
    this.#request(this.#changes.add({ id, prompt, transition }));
    this.#tell();
  }

  pause = () => this.#send({ type: "session.pause" });
  resume = () => this.#send({ type: "session.resume" });
  step = () => this.#send({ type: "session.step" });
  stop = () => this.#send({ type: "session.stop" });

  reset(seed, prompt) {
    if (this.#send({ type: "session.reset", seed, prompt })) this.#changes.add({ prompt, isReset: true });
    this.#tell();
  }

  play = () => this.#player.play();
  goLive = () => this.#player.goLive();
  retryNow = () => this.#connection.retryNow();

  /** Ends what this page holds of it; the server goes on. */
  close() {
    this.#connection?.close();
    this.#player.close();
  }

  /** For each picture that may be new on screen. Returns the changes that it is the first to show, or to show alone. */
  look() {
    const time = this.time;
    const number = this.#chunkAt(time);
    if (number < 0) return [];
    if (number !== this.#onScreen) {
      this.#onScreen = number;
      const { arrived, media_time } = this.chunks.get(number);
      this.lag = Math.max(0, (performance.now() - arrived) / 1000 - (time - media_time));
      this.#tell();
    }
    const shown = this.#changes.shown(number);
    if (shown.length) this.#tell();
    return shown;
  }

  /** Tells the server what has been played; pacing reads it. */
  reportPosition() {
    if (this.#isAttached && this.isController && this.#onScreen >= 0 && !this.hasEnded) {
      this.#send({ type: "session.position", media_time: this.time, displayed_chunk: this.#onScreen });
    }
  }

  #connect() {
    this.#connection = new Connection(
      () => this.#url(),
      () => this.#greeting(),
      (message, media) => this.#receive(message, media),
      (link) => this.#linked(link),
    );
  }

  /** The first chunk that is still missing here; -1, the newest, where there is none yet. */
  get #from() {
    return this.newest < 0 && this.#onScreen < 0 ? -1 : this.newest + 1;
  }

  #url() {
    const watch = `v1/sessions/${encodeURIComponent(this.id)}/watch?from=${this.#from}`;
    const path = this.isController ? "v1/realtime/video" : watch;
    return address(path, location.protocol.replace("http", "ws"));
  }

  #greeting() {
    if (this.#controlToken) {
      return { type: "session.attach", session_id: this.id, token: this.#controlToken, from_chunk: this.#from };
    }
    return this.#hello ?? { type: "watch", token: this.viewToken };
  }

  #request({ id, prompt, transition }) {
    const interaction = { event_id: id, event: { prompt }, transition_chunks: transition };
    this.#send({ type: "session.interaction", interaction });
  }

  #send(message) {
    return this.#connection.send(message);
  }

  #linked(link) {
    this.link = link;
    this.#isAttached &&= link.state === "open";
    if (link.state === "closed" && !this.hasEnded) {
      this.state = "done";
      this.why = link.reason || "the server closed the connection";
    }
    this.#tell();
  }

  #receive(message, media) {
    const handler = this.#handlers[message.type];
    if (!handler) return;
    handler(message, media);
    this.#tell();
  }

  #handlers = {
    "session.queue": ({ position, length }) => {
      this.state = "queued";
      this.queue = { position, length };
    },

    "session.status": ({ text }) => {
      this.doing = text;
    },

    "video.start": (message, init) => {
      this.#isAttached = true;
      this.id = message.session_id;
      this.#controlToken = message.control_token ?? this.#controlToken;
      this.viewToken = message.view_token ?? this.viewToken;
      this.configuration = message.configuration ?? {};
      this.seconds = message.chunk_frames / message.fps;
      this.queue = null;
      this.#player.open(message.mime, init);
      for (const change of this.#changes.open) this.#request(change);
    },

    "video.chunk_metadata": (chunk, fragment) => {
      if (this.chunks.has(chunk.chunk) && chunk.chunk <= this.newest) return;
      this.doing = "";
      this.chunks.set(chunk.chunk, { ...chunk, arrived: performance.now() });
      if (this.chunks.size > MOST_CHUNKS) this.chunks.delete(this.chunks.keys().next().value);
      this.newest = chunk.chunk;
      this.made = chunk.fps;
      this.#changes.made(chunk);
      if (!this.isController) this.#changes.seen(chunk);
      this.#player.append(fragment, chunk.media_time, chunk.media_time + chunk.duration);
    },

    "session.interaction.queued": ({ event_id, chunk, seconds }) => {
      this.#changes.promised(event_id, chunk, seconds);
    },

    "session.state": ({ state, why }) => {
      this.state = state;
      this.why = why ?? this.why;
      this.#changes.received();
      this.queue = state === "queued" ? this.queue : null;
    },

    "session.done": ({ reason }) => {
      this.state = "done";
      this.why = reason;
      this.#player.end();
    },

    error: ({ code, message, event_id }) => {
      if (this.#changes.refused(event_id, message)) return;
      if (!this.#isAttached && this.id) this.#gone(message);
      else this.#complain(message, code);
    },
  };

  // The server does not let this page come back, or in.
  #gone(why) {
    this.state = "done";
    this.why = why;
    this.#connection.close();
  }

  #chunkAt(time) {
    for (let number = this.newest; this.chunks.has(number); number--) {
      const { media_time, duration } = this.chunks.get(number);
      if (time >= media_time - 1e-3) return time < media_time + duration + 0.5 ? number : -1;
    }
    return -1;
  }

  // The browser gave up on the video, as phones do with hidden pages: the same chunks are asked for again.
  #rebuild(why) {
    const now = performance.now();
    this.#rebuilds = [...this.#rebuilds.filter((time) => now - time < 30_000), now];
    if (this.#rebuilds.length > 3) return this.#complain(`The video cannot be played: ${why}.`);
    this.chunks.clear();
    this.newest = Math.max(0, this.#onScreen) - 1;
    this.#connection.close();
    this.#connect();
  }
}

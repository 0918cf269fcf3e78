// A WebSocket that comes back by itself. It knows how messages travel, and nothing of what they mean.

const FIRST_WAIT = 0.5;
const LONGEST_WAIT = 10;
const PING_EVERY = 5;
const SILENCE = 20; // Seconds without an answer to a ping after which the connection counts as lost.
const FINAL = new Set([1000, 1008, 1009, 1011]); // Close codes after which another try would end the same way.
const WITH_MEDIA = new Set(["video.start", "video.chunk_metadata"]); // A binary frame follows each of these.

export class Connection {
  #url;
  #greeting;
  #receive;
  #report;
  #socket = null;
  #announced = null; // The message whose binary frame comes next.
  #tries = 0;
  #retry = 0;
  #pinged = 0;
  #heartbeat = 0;
  #closed = false;
  #wake = () => this.retryNow();

  /**
   * @param {() => string} url of the WebSocket; it and the greeting are asked for at each try, because they may change
   * @param {() => object} greeting the first message
   * @param {(message: object, media?: ArrayBuffer) => void} receive each message, with the media that belongs to it
   * @param {(link: {state: "open" | "lost" | "closed", wait?: number, code?: number, reason?: string}) => void} report
   */
  constructor(url, greeting, receive, report) {
    this.#url = url;
    this.#greeting = greeting;
    this.#receive = receive;
    this.#report = report;
    window.addEventListener("online", this.#wake);
    this.#open();
  }

  send(message) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  retryNow() {
    if (!this.#retry) return;
    clearTimeout(this.#retry);
    this.#open();
  }

  close() {
    this.#closed = true;
    window.removeEventListener("online", this.#wake);
    clearTimeout(this.#retry);
    clearInterval(this.#heartbeat);
    this.#socket?.close(1000);
  }

  #open() {
    this.#retry = 0;
    this.#announced = null;
    const socket = new WebSocket(this.#url());
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.#pinged = 0;
      this.#heartbeat = setInterval(() => this.#beat(), PING_EVERY * 1000);
      this.send(this.#greeting());
      this.#report({ state: "open" });
    };
    socket.onmessage = ({ data }) => this.#take(data);
    socket.onclose = ({ code, reason }) => this.#lost(code, reason);
    this.#socket = socket;
  }

  #take(data) {
    this.#pinged = 0;
    this.#tries = 0;
    if (typeof data !== "string") {
      const announced = this.#announced;
      this.#announced = null;
      if (announced) this.#receive(announced, data);
      return;
    }
    const message = JSON.parse(data);
    if (WITH_MEDIA.has(message.type)) this.#announced = message;
    else if (message.type !== "session.pong") this.#receive(message);
  }

  // A hidden tab's timers run once a minute, so silence is measured from a ping of our own.
  #beat() {
    if (this.#pinged && performance.now() - this.#pinged > SILENCE * 1000) {
      this.#socket.onclose = null;
      this.#socket.close();
      this.#lost(1006, "");
    } else if (!this.#pinged && this.send({ type: "session.ping" })) {
      this.#pinged = performance.now();
    }
  }

  #lost(code, reason) {
    clearInterval(this.#heartbeat);
    if (this.#closed) return;
    if (FINAL.has(code)) {
      this.close();
      this.#report({ state: "closed", code, reason });
      return;
    }
    // Some randomness, so that many pages do not come back to a new server in the same moment.
    const wait = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.#tries++) * (0.75 + Math.random() / 2);
    this.#retry = setTimeout(() => this.#open(), wait * 1000);
    this.#report({ state: "lost", wait, code, reason });
  }
}

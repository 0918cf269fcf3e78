// Plays fragments of MP4 as they come, by Media Source Extensions.

const BEHIND = 20; // Seconds of video that are kept behind the playhead.
const MOST_WAITING = 64e6; // Bytes that may wait for the browser before the oldest are given up.
const EDGE = 0.05; // Seconds: fragments that are closer than that touch.
const STUCK = 5; // Seconds without progress, though there is something to play, after which the browser is nudged.

const Source = window.MediaSource ?? window.ManagedMediaSource; // An iPhone has the managed one alone.

/** What this browser lacks to play `mime`, as a sentence; `null` where it lacks nothing. */
export function missing(mime) {
  if (!Source) {
    const lacks = "This browser cannot play video while it is made: it has no Media Source Extensions.";
    return `${lacks} Chrome, Edge and Firefox have them, and Safari from iOS 17.1 on.`;
  }
  if (!Source.isTypeSupported(mime)) {
    const lacks = `This browser has no decoder for H.264 (${mime}).`;
    return `${lacks} Chrome, Edge, Firefox and Safari have one; on Linux it may be a package of its own.`;
  }
  return null;
}

export class Player {
  #video;
  #report;
  #source = null;
  #buffer = null;
  #mime = "";
  #queue = []; // {bytes, start?}: what is still to be appended, in order.
  #starts = []; // Where the fragments that were appended begin, in seconds. Each begins with a key frame.
  #end = 0; // Where the newest fragment ends, in seconds.
  #behind = BEHIND;
  #begun = false;
  #isFull = false; // With a single fragment.
  #ending = false;
  #moved = { to: 0, at: 0 }; // Where the playhead was last seen to be somewhere else, and when.

  /**
   * @param {HTMLVideoElement} video
   * @param {{skipped: (seconds: number) => void, blocked: (is: boolean) => void, broken: (why: string) => void}} report
   *   `skipped` seconds of video were missing and jumped over; the browser `blocked` playing until a click; the source
   *   is `broken` and has to be opened again
   */
  constructor(video, report) {
    this.#video = video;
    this.#report = report;
    video.disableRemotePlayback = true; // Without it a managed source never opens.
    for (const event of ["timeupdate", "waiting", "stalled", "ended"]) video.addEventListener(event, () => this.#turn());
    video.addEventListener("error", () => this.#break(video.error?.message || "the video cannot be decoded"));
    // Nothing here pauses the video; a browser does, as for a call or by a key of the keyboard.
    video.addEventListener("pause", () => report.blocked(Boolean(this.#source) && !video.ended && !document.hidden));
    video.addEventListener("playing", () => report.blocked(false));
    setInterval(() => this.#nudge(), 1000);
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.#source) this.play();
    });
  }

  get time() {
    return this.#video.currentTime;
  }

  /** Seconds that are here and not played yet. */
  get lead() {
    return this.#begun ? Math.max(0, this.#end - this.time) : 0;
  }

  /** Begins, or goes on after the connection came back: what is buffered stays. */
  open(mime, init) {
    this.#ending = false;
    if (this.#source?.readyState === "open" || this.#source?.readyState === "ended") {
      if (mime !== this.#mime) this.#buffer?.changeType(mime);
    } else {
      this.#attach(mime);
    }
    this.#mime = mime;
    this.#queue.push({ bytes: init });
    this.#turn();
  }

  append(bytes, start, end) {
    this.#queue.push({ bytes, start });
    this.#end = Math.max(this.#end, end);
    let waiting = this.#queue.reduce((sum, entry) => sum + entry.bytes.byteLength, 0);
    while (waiting > MOST_WAITING && this.#queue.length > 2) {
      const oldest = this.#queue.findIndex((entry) => entry.start !== undefined);
      waiting -= this.#queue.splice(oldest, 1)[0].bytes.byteLength;
    }
    this.#turn();
  }

  /** No more will come. */
  end() {
    this.#ending = true;
    this.#turn();
  }

  close() {
    this.#source = this.#buffer = null;
    this.#queue = [];
    this.#starts = [];
    this.#end = 0;
    this.#begun = this.#isFull = this.#ending = false;
    if (this.#video.src) URL.revokeObjectURL(this.#video.src);
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  /** Goes to the newest fragment. */
  goLive() {
    if (this.#starts.length) this.#video.currentTime = this.#starts.at(-1);
  }

  play() {
    this.#video.play().then(
      () => this.#report.blocked(false),
      (error) => error.name === "NotAllowedError" && this.#report.blocked(true),
    );
  }

  #attach(mime) {
    this.close();
    const source = new Source();
    this.#source = source;
    source.addEventListener("sourceopen", () => {
      if (source !== this.#source || this.#buffer) return;
      source.duration = Infinity;
      this.#buffer = source.addSourceBuffer(mime);
      this.#buffer.addEventListener("updateend", () => this.#turn());
      this.#buffer.addEventListener("error", () => this.#break("a fragment cannot be decoded"));
      this.#turn();
    });
    source.addEventListener("startstreaming", () => this.#turn());
    source.addEventListener("sourceclose", () => {
      if (source === this.#source) this.#break("the browser closed the video");
    });
    this.#video.src = URL.createObjectURL(source);
    this.play();
  }

  // The one place in which the buffer is worked on; each event that may let it go on comes here.
  #turn() {
    const source = this.#source;
    const buffer = this.#buffer;
    if (!buffer || buffer.updating || source.readyState === "closed") return;
    if (this.#isFull) {
      if (this.#video.ended) this.#replace();
      return;
    }
    this.#settle();
    if (source.streaming === false || this.#trim()) return;
    if (this.#queue.length) this.#next();
    else if (this.#ending && source.readyState === "open") source.endOfStream();
  }

  #next() {
    const { bytes, start } = this.#queue[0];
    try {
      this.#buffer.appendBuffer(bytes);
      this.#queue.shift();
      if (start !== undefined) this.#starts.push(start);
    } catch (error) {
      if (error.name !== "QuotaExceededError") return this.#break(error.message);
      // Full: less is kept from now on. Where nothing can go yet, playing makes room, and `timeupdate` comes back here.
      this.#behind /= 2;
      if (this.#trim() || this.#starts.length !== 1) return;
      // There is room for a single fragment. A browser plays it to its end only if nothing is to come.
      this.#isFull = true;
      this.#source.endOfStream();
    }
  }

  // The only fragment that the browser has room for is played: the next one takes its place.
  #replace() {
    this.#isFull = this.#begun = false;
    this.#starts = [];
    this.#buffer.remove(0, Infinity);
  }

  // Whole fragments alone are removed, because a removal reaches on to the next key frame.
  #trim() {
    const here = this.#starts.findLastIndex((start) => start <= this.time + EDGE);
    const keep = Math.min(here, this.#starts.findLastIndex((start) => start <= this.time - this.#behind));
    if (keep < 1) return false;
    this.#buffer.remove(0, this.#starts[keep]);
    this.#starts.splice(0, keep);
    return true;
  }

  // Puts the playhead where there is something to play.
  #settle() {
    const ranges = this.#buffer.buffered;
    if (!ranges.length) return;
    if (!this.#begun) {
      this.#begun = true;
      if (ranges.start(0) > this.time) this.#video.currentTime = ranges.start(0);
      this.play();
      return;
    }
    if (this.#video.seeking || this.#video.readyState > HTMLMediaElement.HAVE_CURRENT_DATA) return;
    for (let i = 0; i < ranges.length; i++) {
      const from = i ? Math.max(ranges.end(i - 1), this.time) : this.time;
      if (ranges.start(i) > this.time + EDGE) {
        this.#video.currentTime = ranges.start(i);
        this.#report.skipped(ranges.start(i) - from);
        return;
      }
    }
  }

  // A browser may stop in the middle of what is buffered and tell nobody. It goes on after a seek.
  #nudge() {
    const { buffered, paused, ended, seeking, playbackRate } = this.#video;
    const now = performance.now() / 1000;
    const isHere = (_, i) => buffered.start(i) <= this.time && buffered.end(i) > this.time + 2 * EDGE;
    const canPlay = !paused && !ended && !seeking && playbackRate && Array.from(buffered, isHere).some(Boolean);
    if (!canPlay || this.time !== this.#moved.to) this.#moved = { to: this.time, at: now };
    else if (now > this.#moved.at + STUCK) this.#video.currentTime += EDGE;
  }

  #break(why) {
    if (!this.#source) return;
    this.close();
    this.#report.broken(why);
  }
}

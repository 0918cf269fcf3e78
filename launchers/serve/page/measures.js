// Frames a second that were really shown, from what the browser says of its own decoder.

const WINDOW = 2000; // Milliseconds.

export class PlayedRate {
  #video;
  #samples = []; // [time, frames shown]

  constructor(video) {
    this.#video = video;
  }

  /** Over the last two seconds; `null` before anything is known. A stall counts, because the user sees it. */
  read() {
    const { totalVideoFrames, droppedVideoFrames } = this.#video.getVideoPlaybackQuality();
    const frames = totalVideoFrames - droppedVideoFrames;
    const now = performance.now();
    if (this.#samples.length && frames < this.#samples.at(-1)[1]) this.#samples = []; // A new video counts from zero.
    this.#samples.push([now, frames]);
    while (this.#samples[0][0] < now - WINDOW) this.#samples.shift();
    const [since, before] = this.#samples[0];
    return now - since < WINDOW / 4 ? null : ((frames - before) * 1000) / (now - since);
  }
}

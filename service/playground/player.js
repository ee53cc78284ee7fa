// Plays what a stream brings, at a pace that a person can follow. All that is shown is a function
// of the samples so far and of `t`, how many of them have been played; so one can also go back.

import { stillness } from "./dom.js";

const PACES = {
  slow: () => 500,
  easy: (t, total) => Math.max(5000 / total, 520 * 0.86 ** t),
  once: () => 0,
};

const DRAW = 40; // milliseconds between drawings: the eye needs no more, a slow machine less

export class Player {
  /** `show(t)` draws the first t samples; `state()` is told when playing starts or stops. */
  constructor({ show, state }) {
    Object.assign(this, { show, state, pace: "easy" });
    this.reset(0);
  }

  /** Begin anew, with so many samples to come. */
  reset(total) {
    Object.assign(this, { samples: [], total, t: 0, drawn: 0, drawnAt: 0, owed: 0, last: null, playing: total > 0 });
    this.state(this);
    this.#next();
  }

  /** Take in a sample that has arrived. */
  push(sample) {
    this.samples.push(sample);
  }

  play() {
    if (this.t >= this.total) this.t = 0;
    Object.assign(this, { playing: true, drawn: -1, last: null, owed: 0 });
    this.state(this);
    this.#next();
  }

  pause() {
    this.playing = false;
    this.state(this);
  }

  /** Show the first t samples, and stay there. */
  seek(t) {
    this.playing = false;
    this.t = Math.min(t, this.samples.length);
    this.show(this.t);
    this.state(this);
  }

  get done() {
    return this.t === this.total;
  }

  #next() {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.frame = this.playing ? requestAnimationFrame((now) => this.#step(now)) : null;
  }

  #step(now) {
    this.frame = null;
    if (!this.playing) return;
    this.owed += this.last === null ? 1e-6 : Math.min(now - this.last, 100);
    this.last = now;
    const pace = PACES[stillness.matches ? "once" : this.pace];
    while (this.t < this.samples.length && this.owed > 0) {
      this.owed -= pace(this.t, this.total);
      this.t += 1;
    }
    if (this.t === this.samples.length) this.owed = Math.min(this.owed, 1e-6);
    if (this.t !== this.drawn && (this.t >= this.total || now - this.drawnAt > DRAW)) {
      Object.assign(this, { drawn: this.t, drawnAt: now });
      this.show(this.t);
    }
    if (this.t >= this.total) {
      this.playing = false;
      this.state(this);
    }
    this.#next();
  }
}

// Train mode beside eval mode: each twice, layer by layer, and what turning p does.

import { ask, route } from "./api.js";
import { $, rounded, figure, make, paint, percent, points, release, settled } from "./dom.js";

const PASSES = 32; // for the layers' moments; the first two are shown
const UNITS = 24;

export class Modes {
  /** `fail(error)` is told what goes wrong; `p` null means the model's own rates. */
  constructor({ fail }) {
    Object.assign(this, { fail, p: null, picture: null });
    const ask = settled(() => this.#run(), 150);
    $("p").addEventListener("input", () => {
      this.p = Number($("p").value);
      this.#dial();
      ask();
    });
    $("p-own").addEventListener("click", () => {
      this.p = null;
      this.#dial();
      this.#run();
    });
  }

  /** Show another picture in both modes. */
  begin(picture, { model, version, seed, classes, sites }) {
    Object.assign(this, { picture, model, version, seed, classes, sites });
    this.#dial();
    return this.#run();
  }

  async #run() {
    if (!this.picture) return;
    this.controller?.abort();
    this.controller = new AbortController();
    const query = { passes: PASSES, seed: this.seed, ...(this.p === null ? {} : { p: this.p }) };
    try {
      const path = route(this.model, this.version, "compare");
      this.#show(await ask(path, this.picture, query, this.controller.signal));
    } catch (error) {
      this.fail(error);
    }
  }

  #dial() {
    const own = Math.max(...this.sites?.map((site) => site.p) ?? [0.5]);
    const p = this.p ?? own;
    $("p").value = p;
    $("p").setAttribute("aria-valuetext", this.p === null ? "the model’s own" : String(p));
    $("p-text").textContent = this.p === null
      ? [...new Set(this.sites?.map((site) => rounded(site.p)))].join(" and ") || "–" : rounded(p);
    $("p-own").setAttribute("aria-pressed", String(this.p === null));
    units(p);
  }

  #show({ predictions: [{ eval: plain, train }], layers }) {
    const same = plain[0].every((value, k) => value === plain[1][k]);
    const gap = Math.max(...train[0].map((value, k) => Math.abs(value - train[1][k])));
    release($("passes"));
    $("passes").replaceChildren(
      this.#pair("Eval mode, twice", plain, same ? "identical to the last digit" : "different", "grey"),
      this.#pair("Train mode, twice", train, gap ? `different, by ${points(gap)}` : "identical", "accent"));
    release($("layers"));
    $("layers").replaceChildren(...layers.map((layer) => this.#layer(layer)));
    const best = plain[0].indexOf(Math.max(...plain[0]));
    $("modes-text").textContent =
      `${PASSES} train-mode passes${this.p === null ? "" : ` at p = ${rounded(this.p)}`}; the first two ` +
      `are ${points(gap)} apart. Eval mode says ${this.classes[best]} with ${percent(plain[0][best])}, whatever p is.`;
  }

  #pair(title, passes, remark, kind) {
    const charts = passes.slice(0, 2).map((values) => {
      const best = values.indexOf(Math.max(...values));
      const said = `${this.classes[best]}, ${percent(values[best])}`;
      const canvas = make("canvas", { class: "mini", role: "img", "aria-label": `${title}: ${said}` });
      paint(canvas, (context, width, height, ink) => columns(context, width, height, ink, values, kind));
      return make("figure", {}, canvas, make("figcaption", {}, said));
    });
    return make("div", { class: "pair" }, make("h3", {}, title),
      make("div", { class: "twice" }, ...charts), make("p", { class: `remark ${kind}` }, remark));
  }

  #layer({ name, kind, p, eval: plain, train }) {
    const rate = p === null ? null : this.p ?? p;
    const note = rate === null ? kind : `p = ${rounded(rate)}, kept × ${rounded(1 / (1 - rate))}`;
    const cell = (a, b) => {
      const canvas = make("canvas", { class: "two", "aria-hidden": "true" });
      paint(canvas, (context, width, height, ink) => twoBars(context, width, height, ink, a, b));
      return make("td", {}, make("div", { class: "moments" }, canvas, make("span", {},
        make("span", {}, make("span", { class: "hidden" }, "eval "), figure(a)),
        make("span", { class: "accent" }, make("span", { class: "hidden" }, " train "), figure(b)))));
    };
    return make("tr", { class: rate === null ? "" : "dropout" },
      make("th", { scope: "row" }, name, make("small", {}, note)),
      cell(plain.mean, train.mean), cell(plain.variance, train.variance));
  }
}

function columns(context, width, height, ink, values, kind) {
  const step = width / values.length;
  values.forEach((value, k) => {
    const tall = Math.max(1, value * (height - 2));
    context.fillStyle = tall > 1 ? ink[kind] : ink.line;
    context.fillRect(k * step + 1, height - tall, Math.max(step - 2, 0.5), tall);
  });
}

function twoBars(context, width, height, ink, a, b) {
  const most = Math.max(Math.abs(a), Math.abs(b)) || 1;
  [[a, ink.grey, 0], [b, ink.accent, 1]].forEach(([value, colour, row]) => {
    context.fillStyle = colour;
    context.fillRect(0, row * (height / 2) + 2, Math.max(1, (Math.abs(value) / most) * width), height / 2 - 4);
  });
}

/** Draw units before and after a mask at p: fewer, each taller, the same mean. */
function units(p) {
  const height = Array.from({ length: UNITS }, (_, i) => 0.45 + 0.5 * Math.abs(Math.sin(i * 2.4)));
  const kept = height.map((_, i) => ((i * 7) % UNITS) + 0.5 > p * UNITS);
  const after = height.map((h, i) => (kept[i] ? h / (1 - p) : 0));
  const mean = (values) => values.reduce((a, b) => a + b) / UNITS;
  const left = kept.filter(Boolean).length;
  const text = `${left} of ${UNITS} units ${left === 1 ? "stays" : "stay"}, each × 1/(1−${rounded(p)}) = ` +
    `${rounded(1 / (1 - p))}; hollow ones are dropped. Mean before ${figure(mean(height))}, after ${figure(mean(after))} (dashed).`;
  $("units-text").textContent = text;
  $("units").setAttribute("aria-label", text);
  paint($("units"), (context, width, tall, ink) => {
    const step = width / UNITS;
    const y = (value) => tall - 1 - (value * (tall - 8)) / Math.max(2, ...after);
    height.forEach((h, i) => {
      const bar = (value, inset) => [i * step + inset, y(value), step - 2 * inset, tall - y(value)];
      if (kept[i]) {
        context.fillStyle = ink.accent;
        context.fillRect(...bar(after[i], 1.5));
      }
      context.fillStyle = ink.grey;
      if (kept[i]) context.fillRect(...bar(h, 1.5));
      context.strokeStyle = ink.grey;
      if (!kept[i]) context.strokeRect(...bar(h, 2));
    });
    context.fillStyle = ink.ink;
    for (let x = 0; x < width; x += 8) context.fillRect(x, y(mean(after)), 5, 1.5);
  });
}

// Train mode beside eval mode: each twice, layer by layer, and what turning p does.

import { ask, route } from "./api.js";
import { $, compact, rounded, figure, make, paint, percent, points, release, settled } from "./dom.js";
import { teach } from "./lesson.js";
import { isGaussian, moduleOf, turns } from "./noise.js";

const PASSES = 32; // for the layers' moments; the first two are shown

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
    this.fixed = !sites.some(turns);
    if (this.fixed) this.p = null;
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
    const sites = this.sites ?? [];
    const own = sites.map((site) => site.p).filter((p) => p !== null);
    const p = this.p ?? (own.length ? Math.max(...own) : this.fixed ? 0 : 0.5);
    const fixed = Boolean(this.fixed);
    $("p").disabled = $("p-own").disabled = fixed;
    $("p-why").hidden = !fixed;
    $("p").value = p;
    const rates = [...new Set(own)].sort((a, b) => a - b).map(compact);
    const words = rates.length > 2 ? `${rates[0]} to ${rates.at(-1)}` : rates.join(" and ") || "none";
    $("p").setAttribute("aria-valuetext", this.p === null ? `the model’s own: ${words}` : compact(p));
    $("p-text").textContent = this.p === null ? words : compact(p);
    $("p-own").setAttribute("aria-pressed", String(this.p === null));
    const most = sites.reduce((a, b) => (a && a.units >= b.units ? a : b), undefined);
    teach(most, p);
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
      `${PASSES} train-mode passes${this.p === null ? "" : ` at p = ${compact(this.p)}`}; the first two ` +
      `are ${points(gap)} apart. Eval mode says ${this.classes[best]} with ${percent(plain[0][best])}, ${this.fixed ? "every time" : "whatever p is"}.`;
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
    const site = this.sites.find((one) => moduleOf(one) === name);
    const noisy = site !== undefined || p !== null;
    const cell = (a, b) => {
      const canvas = make("canvas", { class: "two", "aria-hidden": "true" });
      paint(canvas, (context, width, height, ink) => twoBars(context, width, height, ink, a, b));
      return make("td", {}, make("div", { class: "moments" }, canvas, make("span", {},
        make("span", {}, make("span", { class: "hidden" }, "eval "), figure(a)),
        make("span", { class: "accent" }, make("span", { class: "hidden" }, " train "), figure(b)))));
    };
    return make("tr", { class: noisy ? "dropout" : "" },
      make("th", { scope: "row" }, name, make("small", {}, noisy ? effect(site, p) : kind)),
      cell(plain.mean, train.mean), cell(plain.variance, train.variance));
  }
}

/** Say what the noise of a site does at rate p; null: it has none. */
function effect(site, p) {
  if (p === null) return `+ noise of std ${compact(site.std)}`;
  if (site && isGaussian(site)) return `p = ${compact(p)}, × noise of std ${rounded(Math.sqrt(p / (1 - p)))}`;
  const plain = site && site.mean < 1; // not inverted
  return `p = ${compact(p)}, kept × ${plain ? 1 : rounded(1 / (1 - p))}${plain ? `, eval × ${compact(site.mean)}` : ""}`;
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

// Probability bars: eval mode in grey; in the accent each thinned network, their mean and interval.

import { make, paint, percent, release } from "./dom.js";

const MOST = 10;

export class Bars {
  constructor(body) {
    this.body = body;
  }

  /** Lay out a row a class; of many classes, those that matter most for this picture. */
  begin(classes, evalMode) {
    this.evalMode = evalMode;
    const ranked = evalMode.map((p, k) => [p, k]).sort((a, b) => b[0] - a[0]);
    const shown = ranked.slice(0, MOST).map(([, k]) => k).sort((a, b) => a - b);
    release(this.body);
    this.body.parentElement.classList.toggle("words", classes.some((name) => name.length > 3));
    this.rows = shown.map((k) => {
      const canvas = make("canvas", { "aria-hidden": "true" });
      const mean = make("td", { class: "number accent" }, "");
      const row = make("tr", {}, make("th", { scope: "row", title: classes[k] }, classes[k]),
        make("td", { class: "track" }, canvas), make("td", { class: "number" }, percent(evalMode[k])), mean);
      return { k, canvas, mean, row };
    });
    this.body.replaceChildren(...this.rows.map(({ row }) => row));
    this.show([], null);
  }

  /** Draw the first samples of a stream: rows of probabilities, and their summary if there is one. */
  show(samples, summary, lively = false) {
    const best = summary ? summary.mean.indexOf(Math.max(...summary.mean)) : -1;
    for (const { k, canvas, mean, row } of this.rows) {
      mean.textContent = summary ? percent(summary.mean[k]) : "–";
      row.classList.toggle("best", k === best);
      paint(canvas, (context, width, height, ink) => {
        const x = (p) => 6 + p * (width - 12);
        this.#bar(context, x, width, height, this.evalMode[k], ink);
        this.#dots(context, x, height, samples, k, ink, lively);
        if (summary) this.#mean(context, x, height, summary, k, ink);
      });
    }
  }

  #bar(context, x, width, height, p, ink) {
    context.fillStyle = ink.track;
    context.fillRect(x(0), height / 2 - 0.5, x(1) - x(0), 1);
    context.fillStyle = ink.grey;
    context.beginPath();
    context.roundRect(x(0), 4, Math.max(x(p) - x(0), 1.5), height - 8, [0, 3, 3, 0]);
    context.fill();
  }

  #dots(context, x, height, samples, k, ink, lively) {
    context.fillStyle = ink.accent;
    context.globalAlpha = samples.length > 300 ? 0.25 : 0.5;
    samples.forEach(({ probabilities }, t) => {
      context.beginPath();
      context.arc(x(probabilities[k]), height / 2 + scatter(t) * (height / 2 - 6), 2, 0, 7);
      context.fill();
    });
    context.globalAlpha = 1;
    if (!lively || !samples.length) return;
    const t = samples.length - 1;
    context.beginPath();
    context.arc(x(samples[t].probabilities[k]), height / 2 + scatter(t) * (height / 2 - 6), 4.5, 0, 7);
    context.fill();
    context.strokeStyle = ink.paper;
    context.lineWidth = 1.5;
    context.stroke();
  }

  #mean(context, x, height, { mean, lower, upper }, k, ink) {
    context.fillStyle = ink.ink;
    context.fillRect(x(lower[k]), height / 2 - 0.75, x(upper[k]) - x(lower[k]), 1.5);
    for (const end of [lower[k], upper[k]]) context.fillRect(x(end) - 0.75, height / 2 - 4, 1.5, 8);
    const inset = mean[k] < 0.005 ? height / 2 - 5 : 2; // rows of nothing stay quiet
    context.fillStyle = ink.paper;
    context.fillRect(x(mean[k]) - 3, inset, 6, height - 2 * inset);
    context.fillStyle = ink.accent;
    context.fillRect(x(mean[k]) - 1.75, inset, 3.5, height - 2 * inset);
  }
}

/** Spread dots over the height of a bar, -1 to 1: evenly, and the same every time. */
const scatter = (t) => 2 * ((t * 0.618034) % 1) - 1;

/** Quantiles of each class over the samples so far, as NumPy takes them. */
export function quantiles(samples, level) {
  const at = (sorted, q) => {
    const place = q * (sorted.length - 1);
    const low = Math.floor(place);
    return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
  };
  const columns = samples[0].probabilities.map((_, k) =>
    Float64Array.from(samples, ({ probabilities }) => probabilities[k]).sort());
  return {
    lower: columns.map((sorted) => at(sorted, (1 - level) / 2)),
    upper: columns.map((sorted) => at(sorted, (1 + level) / 2)),
  };
}

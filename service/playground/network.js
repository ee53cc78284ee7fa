// A drawing of the thinned network: the picture, a few units of each layer with noise, the classes.

import { paint, percent } from "./dom.js";
import { isGaussian, read } from "./noise.js";

const UNITS = 9;
const LAYERS = 4;
const CLASSES = 10;
const ANY = { sites: [{ units: UNITS }, { units: UNITS }], thin: "thinned", classes: [""], eval: Array(CLASSES).fill(0.1) };

export class Network {
  /** `seen` is the canvas with the picture as the network sees it. */
  constructor(canvas, seen) {
    Object.assign(this, { canvas, seen });
  }

  /** Draw a sample of `run`, the whole network if there is none, or any network if there is no run. */
  show(run = ANY, sample = undefined) {
    const sites = run.sites.length ? run.sites : ANY.sites;
    const wide = sites.map((site, s) => ({ site, s })).filter(({ site }) => site.units > 1); // no branches as a whole
    const layers = wide.slice(0, LAYERS).map(({ site, s }) => layer(site, sample && read(site, sample.kept[s])));
    const outputs = sample?.probabilities ?? run.eval;
    const best = outputs.indexOf(Math.max(...outputs));
    const first = Math.max(0, Math.min(best - CLASSES + 1, outputs.length - CLASSES));
    const shown = outputs.slice(first, first + CLASSES);
    this.canvas.setAttribute("aria-label", run === ANY ? "A network with all its units on" : sample
      ? `The ${run.thin} network ${sample.t} says ${run.classes[best]} with ${percent(outputs[best])}`
      : `The whole network says ${run.classes[best]} with ${percent(outputs[best])}`);
    const label = { text: run.classes[best], place: best - first };
    const seen = run === ANY ? null : this.seen;
    paint(this.canvas, (context, width, height, ink) =>
      this.#draw(context, width, height, ink, seen, layers, shown, label, sample ? ink.accent : ink.grey));
  }

  #draw(context, width, height, ink, seen, layers, outputs, label, colour) {
    const side = Math.min(84, width * 0.2);
    context.imageSmoothingEnabled = false;
    if (seen) context.drawImage(seen, 0, (height - side) / 2, side, side);
    context.strokeStyle = ink.grey;
    if (!seen) context.strokeRect(0.5, (height - side) / 2, side, side);
    const columns = layers.length + 1;
    const right = width - 30 - 7 * Math.min(label.text.length, 9);
    const x = (column) => side + ((column + 1) / columns) * (right - side) - (column < columns - 1 ? 20 : 0);
    const y = (i, count) => ((i + 0.5) * height) / count;
    const units = layers.map(({ sizes, linked }, c) =>
      sizes.map((on, i) => ({ on, i, linked, x: x(c), y: y(i, sizes.length) })));
    const last = outputs.map((p, i) => ({ on: 1, p, x: x(columns - 1), y: y(i, outputs.length) }));
    context.strokeStyle = colour;
    let before = [0.2, 0.4, 0.6, 0.8].map((part, i) => ({ on: 1, i, x: side + 2, y: (height - side) / 2 + part * side }));
    for (const column of [...units, last]) {
      for (const a of before) for (const b of column) if (a.on && b.on && (!b.linked || b.linked(a.i, b.i))) edge(context, a, b);
      before = column;
    }
    context.globalAlpha = 1;
    for (const unit of units.flat()) dot(context, unit, unit.on ? 5.5 * unit.on : 5.5, unit.on ? colour : ink.grey, unit.on, ink.paper);
    for (const unit of last) dot(context, unit, 2 + 6 * Math.sqrt(unit.p), colour, true, ink.paper);
    context.fillStyle = ink.ink;
    context.font = `680 15px ${ink.font}`;
    const text = label.text.length > 10 ? `${label.text.slice(0, 9)}…` : label.text;
    context.fillText(text, right + 14, Math.min(height - 3, Math.max(12, y(label.place, outputs.length) + 5)));
  }
}

/** Take a few units of a site: how large each is, 0 if it is dropped, or which weights link it to others. */
function layer(site, values) {
  const sizes = Array(Math.min(site.kind === "dropconnect" ? site.shape[0] : site.units, UNITS)).fill(1);
  if (!values) return { sizes };
  if (site.kind === "dropconnect") return { sizes, linked: (from, to) => values[to * site.shape[1] + from] };
  return { sizes: sizes.map((_, i) => (isGaussian(site) ? 0.4 + values[i] / 220 : values[i])) };
}

function edge(context, a, b) {
  context.globalAlpha = b.p === undefined ? 0.22 : 0.1 + 0.4 * b.p;
  context.lineWidth = b.p === undefined ? 0.7 : 0.5 + b.p;
  context.beginPath();
  context.moveTo(a.x, a.y);
  context.lineTo(b.x, b.y);
  context.stroke();
}

function dot(context, { x, y }, radius, colour, filled, paper) {
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.fillStyle = filled ? colour : paper;
  context.fill();
  context.strokeStyle = colour;
  context.lineWidth = 1.2;
  if (!filled) context.stroke();
}

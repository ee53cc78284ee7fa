// The noise of one thinned network: a picture a site, of its units, its weights, or its steps and units.

import { make, paint, release } from "./dom.js";
import { described, isGaussian, legend, moduleOf, read, summary } from "./noise.js";

const SHOWN = 4; // sites; the others unfold
const WIDE = 40; // columns that need more room
const MANY = 30_000; // numbers in all, above which a drawing is followed by a
const REST = 120; // in milliseconds

export class Masks {
  /** `key` says how the pictures in `box` are read. */
  constructor(box, key) {
    const rest = make("details", { class: "more-masks sampled" }, make("summary"), make("div", { class: "masks" }));
    Object.assign(this, { box, key, rest, stage: box.closest(".stage"), timer: null });
  }

  /** Lay out a picture a site: `{name, kind, p, shape, units, ...}`. */
  begin(sites, network) {
    clearTimeout(this.timer);
    this.timer = null;
    release(this.box);
    release(this.rest);
    this.many = sites.reduce((sum, { units }) => sum + units, 0) > MANY;
    this.grids = sites.map((site) => {
      const plan = layout(site);
      const size = plan.columns > WIDE ? "large" : site.units === 1 ? "one" : "";
      const canvas = make("canvas", { class: `mask ${size}`, role: "img" });
      const ratio = plan.columns / plan.rows;
      canvas.style.aspectRatio = String(plan.tiled ? ratio : Math.min(3, Math.max(1, ratio)));
      const text = make("p", { class: "small" });
      const title = make("p", { class: "site" }, make("b", {}, moduleOf(site)), ` ${described(site, network)}`);
      return { site, plan, canvas, text, box: make("div", {}, title, canvas, text) };
    });
    this.stage.classList.toggle("across", sites.length > 3 || this.grids.some(({ plan }) => plan.columns > WIDE));
    const boxes = this.grids.map(({ box }) => box);
    const unfold = boxes.splice(SHOWN);
    this.box.replaceChildren(...boxes);
    this.rest.firstElementChild.textContent = `${unfold.length} more places with noise`;
    this.rest.lastElementChild.replaceChildren(...unfold);
    if (unfold.length) this.stage.append(this.rest);
    else this.rest.remove();
    this.key.textContent = legend(sites, network);
    this.show(null);
  }

  /** Draw the noise of a sample, or all units on; many numbers not as often as they come. */
  show(sample) {
    this.sample = sample;
    if (this.timer) return;
    this.grids.forEach((grid, s) => draw(grid, sample && sample.kept[s]));
    if (this.many) this.timer = setTimeout(() => {
      this.timer = null;
      if (this.sample !== sample) this.show(this.sample);
    }, REST);
  }
}

/** Choose where each number goes, in tiles: of one unit, of a channel's pixels, or one of a whole matrix. */
function layout({ shape, units }) {
  const [height, width] = shape.length === 3 || (shape.length === 2 && shape[0] > 1) ? shape.slice(-2) : [1, 1];
  const size = height * width;
  const across = tiles(units / size);
  const gap = size > 1 ? 1 : 0;
  const columns = across * (width + gap) - gap;
  const places = Int32Array.from({ length: units }, (_, i) => {
    const [tile, row, column] = [Math.floor(i / size), Math.floor((i % size) / width), i % width];
    return (Math.floor(tile / across) * (height + gap) + row) * columns + (tile % across) * (width + gap) + column;
  });
  const rows = Math.ceil(units / size / across) * (height + gap) - gap;
  const [tiled, gaps] = [units > size, size === 1 || units === size];
  return { columns, rows, places, tiled, gaps, canvas: new OffscreenCanvas(columns, rows) };
}

/** Choose columns: nearly a square, and no row left over if that can be. */
function tiles(count) {
  const side = Math.ceil(Math.sqrt(count));
  for (let columns = side; columns <= 2 * side; columns += 1) if (count % columns === 0) return columns;
  return side;
}

function draw({ site, plan, canvas, text }, kept) {
  paint(canvas, (context, width, height, ink) => {
    const values = kept && read(site, kept);
    text.textContent = summary(site, values);
    canvas.setAttribute("aria-label", `${site.name}: ${text.textContent}`);
    const shades = values && isGaussian(site) ? scale(ink) : [ink.track, values ? ink.accent : ink.grey].map(rgb);
    const shown = values ?? new Uint8Array(site.units).fill(1);
    plan.canvas.getContext("2d").putImageData(picture(plan, shown, shades), 0, 0);
    context.imageSmoothingEnabled = plan.columns > context.canvas.width || plan.rows > context.canvas.height;
    context.imageSmoothingQuality = "high";
    context.drawImage(plan.canvas, 0, 0, width, height);
    if (plan.gaps) squares(context, width / plan.columns, height / plan.rows, plan, isGaussian(site) ? null : shown);
  });
}

function picture({ columns, rows, places }, values, shades) {
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  const words = shades.map(([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);
  for (let i = 0; i < values.length; i += 1) pixels[places[i]] = words[values[i]];
  return image;
}

/** Where cells are large enough, leave gaps between them, and make those that are dropped hollow. */
function squares(context, across, down, { columns, rows, places }, mask) {
  const cell = Math.min(across, down);
  if (cell <= 2.5) return;
  const gap = cell > 5 ? 1.5 : 0.7;
  for (let x = 1; x <= columns; x += 1) context.clearRect(x * across - gap, 0, gap, rows * down);
  for (let y = 1; y <= rows; y += 1) context.clearRect(0, y * down - gap, columns * across, gap);
  if (cell < 5 || !mask) return;
  mask.forEach((bit, i) => {
    const [x, y] = [(places[i] % columns) * across, Math.floor(places[i] / columns) * down];
    if (!bit) context.clearRect(x + 1, y + 1, across - gap - 2, down - gap - 2);
  });
}

/** Make shades of normal numbers by quantile: grey below the mean, paler towards it, then the accent. */
function scale(ink) {
  const [low, middle, high] = [ink.quiet, ink.track, ink.accent].map(rgb);
  return Array.from({ length: 256 }, (_, byte) => {
    const part = (byte - 127.5) / 127.5;
    return middle.map((m, c) => Math.round(m + Math.abs(part) * ((part < 0 ? low : high)[c] - m)));
  });
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

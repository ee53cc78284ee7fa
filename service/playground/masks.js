// The masks of one thinned network: a grid a dropout site, a square a unit, filled where it is kept.

import { rounded, make, paint, release } from "./dom.js";

export class Masks {
  constructor(box) {
    this.box = box;
  }

  /** Lay out a grid a site: `{name, kind, p, shape, units}`. */
  begin(sites) {
    release(this.box);
    this.grids = sites.map((site) => {
      const canvas = make("canvas", { class: "mask", role: "img" });
      const columns = width(site.units);
      canvas.style.aspectRatio = `${columns} / ${Math.ceil(site.units / columns)}`;
      const text = make("p", { class: "small" });
      const title = make("p", { class: "site" }, make("b", {}, site.name), ` p = ${rounded(site.p)}`);
      return { site, canvas, text, box: make("div", {}, title, canvas, text) };
    });
    this.box.replaceChildren(...this.grids.map(({ box }) => box));
    this.show(null);
  }

  /** Draw the masks of a sample, or all units on. */
  show(sample) {
    this.grids.forEach(({ site, canvas, text }, s) => {
      const kept = sample ? bits(sample.kept[s], site.units) : new Uint8Array(site.units).fill(1);
      const count = kept.reduce((sum, bit) => sum + bit, 0);
      text.textContent = sample ? `${count} of ${site.units} kept` : `all ${site.units} on`;
      canvas.setAttribute("aria-label", `${site.name}: ${text.textContent}`);
      paint(canvas, (context, across, _, ink) => grid(context, across, ink, kept, Boolean(sample)));
    });
  }
}

/** Read bits, most significant first, from base64. */
export function bits(text, count) {
  const bytes = atob(text);
  return Uint8Array.from({ length: count }, (_, i) => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1);
}

/** Choose columns: nearly a square, and no row left over if that can be. */
function width(units) {
  const side = Math.ceil(Math.sqrt(units));
  for (let columns = side; columns <= 2 * side; columns += 1) if (units % columns === 0) return columns;
  return side;
}

function grid(context, across, ink, kept, thinned) {
  const columns = width(kept.length);
  const cell = across / columns;
  const gap = cell > 5 ? 1.5 : cell > 2.5 ? 0.7 : 0;
  kept.forEach((bit, i) => {
    const x = (i % columns) * cell;
    const y = Math.floor(i / columns) * cell;
    context.fillStyle = bit ? (thinned ? ink.accent : ink.grey) : ink.track;
    context.fillRect(x, y, cell - gap, cell - gap);
    if (bit || cell < 5) return;
    context.fillStyle = ink.paper;
    context.fillRect(x + 1, y + 1, cell - gap - 2, cell - gap - 2);
  });
}

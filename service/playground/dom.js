// Small things that every part of the page uses: elements, numbers in words, canvases in colour.

export const $ = (id) => document.getElementById(id);

/** Make an element: `make("p", {class: "small"}, "text", child)`; attributes that are false are left out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Write a probability as people do, and never as certain when it is not. */
export function percent(p) {
  if (p === 0 || p === 1) return `${100 * p}%`;
  if (p < 0.001) return "<0.1%";
  if (p > 0.999) return ">99.9%";
  return p < 0.0995 || p > 0.9905 ? `${(100 * p).toFixed(1)}%` : `${Math.round(100 * p)}%`;
}

/** Write a probability within a sentence. */
export const spoken = (p) => percent(p).replace("<", "less than ").replace(">", "more than ");

/** Write a rate or a factor: no more than two decimals, and none that say nothing. */
export const rounded = (x) => String(Number(x.toFixed(2)));

/** Write a rate or a deviation, in as few digits as it needs. */
export const compact = (x) => String(Number(x.toPrecision(3)));

/** Write how many: `many(1, "network")`, `many(2, "network")`. */
export const many = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** Write a difference of probabilities in percentage points. */
export const points = (gap) =>
  gap < 0.0005 ? "less than 0.1 points" : `${(100 * gap).toFixed(gap < 0.0995 ? 1 : 0)} points`;

/** Write a number with as many digits as a reader wants. */
export function figure(x) {
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size < 0.001) return x.toExponential(0).replace("e-", "·10⁻").replace(/⁻(\d+)/, (_, d) => "⁻" + raised(d));
  return x.toFixed(size < 0.1 ? 3 : size < 100 ? 2 : 0);
}

/** Write an entropy. */
export const nats = (x) => (x < 0.001 ? "<0.001" : figure(x));

const raised = (digits) => [...digits].map((d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("");

const painted = new Map();

/** Draw on a canvas now, and again whenever its size or the colour scheme changes. */
export function paint(canvas, draw) {
  if (!painted.has(canvas)) resized.observe(canvas);
  painted.set(canvas, draw);
  repaint(canvas);
}

/** Forget canvases inside an element that is about to be emptied. */
export function release(element) {
  for (const canvas of element.querySelectorAll("canvas")) {
    resized.unobserve(canvas);
    painted.delete(canvas);
  }
}

function repaint(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  painted.get(canvas)(context, width, height, colours());
}

let palette = null;

/** The style sheet's colours by name: `colours().accent`. */
export function colours() {
  if (!palette) {
    const style = getComputedStyle(document.documentElement);
    const names = ["paper", "card", "ink", "quiet", "line", "track", "grey", "accent", "soft"];
    palette = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    palette.font = getComputedStyle(document.body).fontFamily;
  }
  return palette;
}

const repaintAll = () => {
  palette = null;
  for (const canvas of painted.keys()) repaint(canvas);
};
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (painted.has(target)) repaint(target);
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaintAll);

export const stillness = window.matchMedia("(prefers-reduced-motion: reduce)");

/** Call `f` once things have been quiet for a while. */
export function settled(f, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => f(...values), milliseconds);
  };
}

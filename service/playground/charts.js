// Two small charts: the running mean with its standard error, and that error alone.

import { figure, many, paint, percent } from "./dom.js";

const LINES = 3;
// 97.5% quantiles of Student's distribution, by degrees of freedom from 1.
const STUDENT = [12.71, 4.3, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26];

/** Draw the running mean of the likeliest classes; eval mode is the dashed line. */
export function meanChart(canvas, { samples, total, classes, evalMode }) {
  const last = samples.at(-1);
  const top = last.mean.map((p, k) => [p, k]).sort((a, b) => b[0] - a[0]).slice(0, LINES);
  const best = top[0][1];
  canvas.setAttribute("aria-label", `Running mean after ${many(samples.length, "network")}: ` +
    top.map(([p, k]) => `${classes[k]} ${percent(p)}`).join(", "));
  paint(canvas, (context, width, height, ink) => {
    const plot = frame(context, width, height, ink, total, 1, (y) => `${100 * y}%`);
    const band = samples.filter((sample) => sample.standard_error);
    context.fillStyle = ink.soft;
    context.beginPath();
    for (const s of band) context.lineTo(plot.x(s.t), plot.y(Math.min(1, s.mean[best] + halfInterval(s, best))));
    for (const s of band.reverse()) context.lineTo(plot.x(s.t), plot.y(Math.max(0, s.mean[best] - halfInterval(s, best))));
    context.fill();
    dashed(context, plot, evalMode[best], total, ink);
    const labels = [];
    for (const [, k] of top.reverse()) {
      context.strokeStyle = k === best ? ink.accent : ink.quiet;
      context.lineWidth = k === best ? 2.5 : 1.25;
      line(context, samples.map((s) => [plot.x(s.t), plot.y(s.mean[k])]));
      labels.push({ text: short(classes[k]), y: plot.y(last.mean[k]), bold: k === best });
    }
    spread(labels, 13, plot.y(0));
    for (const { text, y, bold } of labels) {
      context.font = `${bold ? 700 : 400} 12px ${ink.font}`;
      context.fillStyle = bold ? ink.accent : ink.quiet;
      context.fillText(text, plot.x(last.t) + 5, y + 4);
    }
  });
}

/** Half of the 95% interval of a class's mean: what it would be over all masks lies within. */
function halfInterval({ standard_error: error, degrees_of_freedom: degrees }, k) {
  return error[k] * (STUDENT[degrees - 1] ?? 1.96 + 2.6 / degrees);
}

/** Draw the standard error of the likeliest class; dashed: what independent masks would give. */
export function errorChart(canvas, { samples, total, stratified }) {
  const last = samples.at(-1);
  const best = last.mean.indexOf(Math.max(...last.mean));
  const points = samples.filter((s) => s.standard_error).map((s) => [s.t, s.standard_error[best]]);
  const naive = stratified ? independent(samples, best) : [];
  const highest = Math.max(points.length || naive.length > 3 ? 1e-6 : 0.01, ...points.map(([, y]) => y), ...naive.slice(3).map(([, y]) => y));
  canvas.setAttribute("aria-label", points.length
    ? `Standard error ${figure(points.at(-1)[1])} after ${many(last.t, "network")}` : "Standard error: not known yet");
  paint(canvas, (context, width, height, ink) => {
    const plot = frame(context, width, height, ink, total, highest, (y) => String(Number((100 * y).toPrecision(2))), 14);
    context.save();
    context.beginPath();
    context.rect(plot.x(0), 0, width, height);
    context.clip();
    context.strokeStyle = ink.quiet;
    context.setLineDash([4, 4]);
    context.lineWidth = 1.25;
    line(context, naive.slice(3).map(([t, y]) => [plot.x(t), plot.y(y)]));
    context.setLineDash([]);
    context.strokeStyle = ink.accent;
    context.lineWidth = 2.5;
    line(context, points.map(([t, y]) => [plot.x(t), plot.y(y)]));
    context.restore();
  });
}

/** sqrt(variance/t) as samples come (Welford): pairs of t and the error. */
function independent(samples, k) {
  let mean = 0;
  let squares = 0;
  return samples.flatMap(({ probabilities }, i) => {
    const gap = probabilities[k] - mean;
    mean += gap / (i + 1);
    squares += gap * (probabilities[k] - mean);
    return i ? [[i + 1, Math.sqrt(squares / i / (i + 1))]] : [];
  });
}

function frame(context, width, height, ink, total, highest, label, right = 58) {
  const [left, top, bottom] = [44, 10, 22];
  const plot = {
    x: (t) => left + (t / total) * (width - left - right),
    y: (value) => height - bottom - (value / highest) * (height - top - bottom),
  };
  context.font = `12px ${ink.font}`;
  for (const value of [0, highest / 2, highest]) {
    context.fillStyle = ink.line;
    context.fillRect(left, plot.y(value), width - left - right, 1);
    context.fillStyle = ink.quiet;
    context.textAlign = "right";
    context.fillText(label(value), left - 7, plot.y(value) + 4);
  }
  context.fillText(String(total), plot.x(total), height - 5);
  context.textAlign = "left";
  context.fillText("0", left, height - 5);
  return plot;
}

function line(context, points) {
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  context.stroke();
}

function dashed(context, plot, value, total, ink) {
  context.setLineDash([4, 4]);
  context.strokeStyle = ink.quiet;
  context.lineWidth = 1.25;
  line(context, [[plot.x(0), plot.y(value)], [plot.x(total), plot.y(value)]]);
  context.setLineDash([]);
}

/** Push labels apart that would lie on one another. */
function spread(labels, gap, lowest) {
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((label, i) => (label.y = Math.min(label.y, lowest - gap * (labels.length - 1 - i))));
  for (let i = 1; i < labels.length; i += 1) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + gap);
}

const short = (name) => (name.length > 8 ? `${name.slice(0, 7)}…` : name);

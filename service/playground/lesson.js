// What the noise of a method does to units, in a few sentences and a drawing that follows p.

import { $, compact, figure, paint, rounded } from "./dom.js";
import { isGaussian, normal } from "./noise.js";

const UNITS = 24;
const KEEPS = "On average nothing changes; what changes is the spread. So p can be turned without touching the weights.";
const LESSONS = {
  dropout: ["Inverted dropout keeps the mean",
    `A unit is dropped with probability p, and the ones that stay are multiplied by 1/(1−p). ${KEEPS}`],
  dropconnect: ["DropConnect keeps the mean",
    "It drops weights where dropout drops units: each with probability p, and the ones that stay are multiplied by 1/(1−p). " +
    "All units stay, with fewer connections, and on average each gets what it got before."],
  gaussian: ["Gaussian dropout keeps the mean",
    "A unit is multiplied by a normal number of mean 1 and variance p/(1−p), as of dropout’s masks. None is off: " +
    `some are weaker, some stronger. ${KEEPS}`],
  noise: ["Additive noise keeps the mean",
    "A normal number is added to each unit, however large the unit is. Eval mode adds the mean of these numbers. " +
    "There is no rate, only a standard deviation."],
  vanilla: ["Vanilla dropout scales in eval mode",
    "A unit is dropped with probability p, and the ones that stay are left as they are. Eval mode multiplies all " +
    "by 1−p of the model’s own rate instead: the weight scaling rule. So the weights suit one p; at others train " +
    "mode has another mean."],
  zoneout: ["Zoneout keeps some of the past",
    "At each step a unit of the state stays as it was with probability p, and is updated else. Eval mode takes " +
    "the mean: p of the old value, 1−p of the new one."],
};

/** Explain a site's noise at rate p; without a site, inverted dropout. */
export function teach(site, p) {
  const kind = site && !LESSONS[site.kind] && site.mean < 1 ? "vanilla" : LESSONS[site?.kind] ? site.kind : "dropout";
  [$("lesson-title").textContent, $("lesson").textContent] = LESSONS[kind];
  const before = Array.from({ length: UNITS }, (_, i) => 0.45 + 0.5 * Math.abs(Math.sin(i * 2.4)));
  const order = before.map((_, i) => ((i * 7) % UNITS) + 0.5);
  const kept = order.map((place) => (site && isGaussian(site)) || place > p * UNITS);
  const old = before.map((_, i) => 0.45 + 0.5 * Math.abs(Math.sin(i * 1.3 + 2))); // for zoneout: a step before
  const std = kind === "noise" ? site.std : Math.sqrt(p / (1 - p));
  const after = before.map((h, i) => {
    const z = normal(order[i] / UNITS);
    if (kind === "noise") return h + site.mean + std * z;
    if (kind === "gaussian") return h * (1 + std * z);
    if (!kept[i]) return kind === "zoneout" ? old[i] : 0;
    return ["vanilla", "zoneout"].includes(kind) ? h : h / (1 - p);
  });
  const left = kept.filter(Boolean).length;
  const noun = kind === "dropconnect" ? "weights" : "units";
  const stays = `${left} of ${UNITS} ${noun} ${left === 1 ? "stays" : "stay"}`;
  const words = {
    dropout: `${stays}, each × 1/(1−${compact(p)}) = ${rounded(1 / (1 - p))}; hollow ones are dropped.`,
    gaussian: `${UNITS} units, each × a number of mean 1 and standard deviation ${rounded(std)}.`,
    noise: `${UNITS} units, each + a number of mean ${compact(site?.mean ?? 0)} and standard deviation ${compact(std)}.`,
    vanilla: `${stays}, each × 1; hollow ones are dropped.`,
    zoneout: `${left} of ${UNITS} units ${left === 1 ? "is" : "are"} updated; hollow ones stay as they were.`,
  };
  const text = `${words[kind] ?? words.dropout} Mean before ${figure(mean(before))}, after ${figure(mean(after))} (dashed).`;
  $("units-text").textContent = text;
  $("units").setAttribute("aria-label", text);
  paint($("units"), (context, width, tall, ink) => bars(context, width, tall, ink, before, after, kept, kind === "zoneout"));
}

const mean = (values) => values.reduce((a, b) => a + b) / values.length;

function bars(context, width, tall, ink, before, after, kept, holds) {
  const step = width / before.length;
  const y = (value) => tall - 1 - (Math.max(0, value) * (tall - 8)) / Math.max(2, ...after);
  before.forEach((h, i) => {
    const bar = (value, inset) => [i * step + inset, y(value), step - 2 * inset, tall - y(value)];
    const drawn = [[h, ink.grey], [after[i], ink.accent]].sort(([a], [b]) => b - a); // the taller one behind
    if (kept[i]) for (const [value, colour] of drawn) {
      context.fillStyle = colour;
      context.fillRect(...bar(value, 1.5));
    }
    context.strokeStyle = ink.grey;
    if (!kept[i]) context.strokeRect(...bar(holds ? after[i] : h, 2));
  });
  context.fillStyle = ink.ink;
  for (let x = 0; x < width; x += 8) context.fillRect(x, y(mean(after)), 5, 1.5);
}

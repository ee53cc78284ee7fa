// The picture beside ones that the model was not made for: what eval mode says, and the doubt.

import { askAll, route } from "./api.js";
import { $, rounded, figure, make, nats, percent, release } from "./dom.js";
import { doubtBar } from "./doubt.js";
import { imageData, toPng } from "./pixels.js";

export class Odd {
  constructor({ fail }) {
    this.fail = fail;
    this.noise = 1;
    $("odd-again").addEventListener("click", () => {
      this.noise += 1;
      this.#run();
    });
  }

  /** Show what the network saw, and what can be made of it. */
  begin(input, run) {
    Object.assign(this, { input, run });
    return this.#run();
  }

  async #run() {
    if (!this.input) return;
    this.controller?.abort();
    this.controller = new AbortController();
    const { signal } = this.controller;
    const { model, version, samples, seed, masks, classes } = this.run;
    const kinds = variants(this.input, this.noise);
    try {
      const pictures = await Promise.all(kinds.map(({ input }) => toPng(input, this.run.invert)));
      const path = (task) => route(model, version, task);
      const [plain, doubt] = await Promise.all([
        askAll(path("predict"), pictures, {}, signal),
        askAll(path("uncertainty"), pictures, { samples, seed, masks }, signal),
      ]);
      this.#show(kinds, plain, doubt, Math.log(classes.length));
    } catch (error) {
      this.fail(error);
    }
  }

  #show(kinds, plain, doubt, most) {
    const rows = kinds.map(({ name, input }, i) => {
      const picture = make("canvas", { class: "thumb", "aria-hidden": "true" });
      const [image, { width, height }] = [imageData(input), input];
      Object.assign(picture, { width, height });
      picture.getContext("2d").putImageData(image, 0, 0);
      const bar = make("canvas", { class: "doubt-bar", role: "img" });
      doubtBar(bar, doubt[i], most);
      return make("tr", {}, make("th", { scope: "row" }, picture, make("span", {}, name)),
        make("td", {}, make("b", {}, plain[i].label), ` ${percent(plain[i].probability)}`),
        make("td", {}, bar, make("span", { class: "small" }, nats(doubt[i].predictive_entropy))));
    });
    release($("odd"));
    $("odd").replaceChildren(...rows);
    $("odd-scale").textContent = `Full width: ${figure(most)} nats, knowing nothing.`;
    $("odd-text").textContent = summary(kinds, plain, doubt);
  }
}

/** Say which picture is doubted most, and whether that is disagreement; and which raised no doubt. */
function summary(kinds, plain, doubt) {
  const total = doubt.map((one) => one.predictive_entropy);
  const k = total.indexOf(Math.max(...total));
  const name = (i) => kinds[i].noun;
  const calm = total.map((_, i) => i).slice(1).filter((i) => total[i] < 0.2 && plain[i].probability > 0.9);
  const caveat = calm.length
    ? ` It raises no alarm about ${calm.map(name).join(" or ")}: doubt helps, but not always.` : "";
  if (k === 0) return `It doubts yours most. Start from a clearer picture.${caveat}`;
  const rise = total[k] - total[0];
  const part = (doubt[k].mutual_information - doubt[0].mutual_information) / rise;
  const times = rounded(Number((total[k] / total[0]).toPrecision(2)));
  const more = total[0] <= 0.05 ? "" : times === "1" ? ", hardly more than yours" : `, ${times} times as much as yours`;
  const source = part > 0.02
    ? `${Math.min(100, Math.round(100 * part))}% of the rise is disagreement between networks.`
    : "The networks do not disagree more; each by itself is less sure.";
  return `It doubts ${name(k)} most${more}. ${source}${caveat}`;
}

/** Make odd pictures out of one: each `{name, noun, input}`, with pixels as the network sees them. */
function variants(input, seed) {
  const { height, width, channels, pixels } = input;
  const at = (y, x, c) => pixels[(y * width + x) * channels + c];
  const made = (name, noun, pixel) => {
    const values = new Uint8Array(pixels.length);
    for (let i = 0; i < values.length; i += 1) {
      const [c, x, y] = [i % channels, Math.floor(i / channels) % width, Math.floor(i / channels / width)];
      values[i] = pixel(y, x, c);
    }
    return { name, noun, input: { height, width, channels, pixels: values } };
  };
  const random = generator(seed);
  const turned = (y, x, c) => at(Math.floor(((width - 1 - x) * height) / width), Math.floor((y * width) / height), c);
  const shuffled = [...Array(height * width).keys()];
  for (let i = shuffled.length - 1; i > 0; i -= 1) {
    const j = Math.floor(random() * (i + 1));
    [shuffled[i], shuffled[j]] = [shuffled[j], shuffled[i]];
  }
  return [
    { name: "Your picture", noun: "yours", input },
    made("A quarter turned", "the turned one", turned),
    made("Light for dark", "the negative", (y, x, c) => 255 - at(y, x, c)),
    made("Pixels shuffled", "shuffled pixels", (y, x, c) => pixels[shuffled[y * width + x] * channels + c]),
    made("Noise", "noise", () => Math.floor(256 * random())),
  ];
}

/** Random numbers from a seed (mulberry32), so that one can come back to a picture. */
function generator(seed) {
  let state = seed * 0x9e3779b9;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

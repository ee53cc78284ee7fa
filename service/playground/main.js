// Puts the parts together: a picture and a model make a stream; the player shows it; the rest follows.

import { ask, get, listen, route, Trouble } from "./api.js";
import { Bars, quantiles } from "./bars.js";
import { errorChart, meanChart } from "./charts.js";
import { Code } from "./code.js";
import { Modes } from "./compare.js";
import { $, figure, make, nats, percent, points, settled, spoken } from "./dom.js";
import { doubtBar, doubtWords } from "./doubt.js";
import { Masks } from "./masks.js";
import { Network } from "./network.js";
import { about, caption, isGaussian } from "./noise.js";
import { Odd } from "./odd.js";
import { Picture } from "./picture.js";
import { fromWire, imageData } from "./pixels.js";
import { Player } from "./player.js";

const bars = new Bars($("bars"));
const masks = new Masks($("masks"), $("masks-key"));
const network = new Network($("network"), $("seen"));
const code = new Code();
const modes = new Modes({ fail });
const odd = new Odd({ fail });
const player = new Player({ show, state: controls });
const picture = new Picture({ changed: look });

const NOTHING = " This network draws no noise, so there is nothing to sample: every time it is asked, it answers the same.";
let details = null; // of the model that is asked
let run = null; // what the stream's first event said, and its last
let stream = null;
let choice = null;
let retry = null; // what the alert's button does

$("model").addEventListener("change", () => choose(readModel));
$("version").addEventListener("change", () => choose(readVersion));
$("alert-close").addEventListener("click", () => ($("alert").hidden = true));
$("alert-again").addEventListener("click", () => retry());
$("play").addEventListener("click", () => (player.playing ? player.pause() : player.play()));
$("scrub").addEventListener("input", () => player.seek(Number($("scrub").value)));
$("speed").addEventListener("change", () => (player.pace = $("speed").value));
$("reseed").addEventListener("click", () => {
  $("seed").value = 1 + Math.floor(Math.random() * 99_999);
  look();
});
for (const id of ["samples", "seed", "kind"]) $(id).addEventListener("change", settled(look, 50));

network.show();
choose(readModels);

/** Read about what was chosen; of several choices in a row the newest counts, and stops the others. */
async function choose(read) {
  choice?.abort();
  choice = new AbortController();
  const { signal } = choice;
  try {
    await read(signal);
  } catch (error) {
    if (signal.aborted) return;
    stream?.abort();
    details = null;
    stale("No answer this time.");
    fail(error, () => choose(read));
  }
}

async function readModels(signal) {
  const { models } = await get("v1/models", signal);
  if (!models.length) throw new Trouble("none");
  $("model").replaceChildren(...models.map(({ name, default: chosen }) =>
    make("option", { selected: chosen }, name)));
  await readModel(signal);
}

async function readModel(signal) {
  const { version, versions } = await get(route($("model").value), signal);
  const newest = [...versions].sort((a, b) => b - a);
  $("version").replaceChildren(...newest.map((v) => make("option", { selected: v === version }, String(v))));
  await readVersion(signal);
}

async function readVersion(signal) {
  const [model, version] = [$("model").value, $("version").value];
  details = await get(`${route(model)}/versions/${version}`, signal);
  describe(details);
  await picture.suit({ model, version, input: details.input, noisy: details.sites.length > 0 }, signal);
}

/** Say which network was chosen, and call its samples what they are. */
function describe({ sites }) {
  $("about").textContent = about(details);
  $("about").hidden = false;
  document.body.classList.toggle("plain", !sites.length);
  for (const word of document.querySelectorAll(".thin")) word.textContent = thin(sites);
  $("network-text").textContent = caption(sites);
  $("noise-key").textContent = sites.some(isGaussian) ? "with noise (noisy networks)" : "units dropped (thinned networks)";
}

const thin = (sites) => (sites.some(isGaussian) ? "noisy" : "thinned");

/** Ask about the picture: follow the stream, and let the player show it. */
async function look() {
  stream?.abort();
  stream = new AbortController();
  const { signal } = stream;
  $("alert").hidden = true;
  $("count").textContent = "–";
  if (!details) return stale("No model to ask yet.");
  if (!picture.blob) return stale("Give it a picture: draw one, choose a file, or take an example.");
  if (!details.sites.length) return predict(details, picture.blob, signal);
  const wrong = [$("samples"), $("seed")].find((field) => !field.checkValidity());
  if (wrong) return outOfRange(wrong);
  const query = { samples: $("samples").value, seed: $("seed").value, masks: $("kind").value };
  const { blob } = picture; // of this and the model there may be others before the stream begins
  const { name, version, input, network: { kind } } = details;
  const path = route(name, version, "uncertainty/stream");
  try {
    for await (const [event, data] of listen(path, blob, query, signal)) {
      if (signal.aborted) return;
      if (event === "start") begin(data, blob, { ...input, kind });
      if (event === "sample") player.push(data);
      if (event === "end") run.end = data.predictions[0];
      if (event === "error") throw new Trouble(data.status, data);
    }
    if (player.done && !signal.aborted) show(player.t);
  } catch (error) {
    if (signal.aborted) return;
    if (error.most) return suitSamples(error.most);
    refuse(error);
  }
}

/** Ask a model that has no noise: there is nothing to sample. */
async function predict({ name, version, classes }, blob, signal) {
  try {
    const { predictions: [{ probabilities }] } = await ask(route(name, version, "predict"), blob, {}, signal);
    player.reset(0);
    run = { classes, eval: probabilities, sites: [] };
    const { width, height } = $("pad"); // which is all that is known of what the network sees
    Object.assign($("seen"), { width, height });
    $("seen").getContext("2d").drawImage($("pad"), 0, 0);
    arrived();
    verdict(null, 0);
    $("spoken").textContent = $("verdict").innerText;
  } catch (error) {
    if (!signal.aborted) refuse(error);
  }
}

function refuse(error) {
  if (error.ofPicture) picture.drop();
  stale("No answer this time.");
  fail(error);
}

/** Learn how many networks the service allows; where the page's own choice is more, take as many. */
function suitSamples(most) {
  const field = $("samples");
  field.max = most;
  if (field.value === field.defaultValue) Object.assign(field, { defaultValue: most, value: most });
  return look();
}

/** Say what a number may be. */
function outOfRange(field) {
  const name = field.parentElement.firstChild.textContent.trim();
  stale("No answer this time.");
  alarm(`${name}: choose a whole number from ${field.min} to ${field.max}.`);
}

/** Lay out all parts for a stream that has begun. */
function begin(data, blob, { invert, kind }) {
  const { sites, classes } = data;
  run = { ...data, invert, thin: thin(sites), input: fromWire(data.input), most: Math.log(classes.length), end: null };
  $("scrub").max = run.samples;
  arrived();
  masks.begin(run.sites, kind);
  seen();
  player.pace = $("speed").value;
  player.reset(run.samples);
  show(0);
  modes.begin(blob, run);
  odd.begin(run.input, run);
  code.begin(blob, run);
}

/** Show the parts that every answer has. */
function arrived() {
  document.body.classList.add("ready");
  document.body.classList.remove("stale");
  bars.begin(run.classes, run.eval);
  network.show(run);
}

function seen() {
  const { height, width, channels } = run.input;
  Object.assign($("seen"), { height, width });
  $("seen").getContext("2d").putImageData(imageData(run.input), 0, 0);
  $("seen-text").textContent = `${width} × ${height} pixels, ${channels === 1 ? "grey" : "colour"}, and nothing else.`;
}

/** Show the first t samples. */
function show(t) {
  const samples = player.samples.slice(0, t);
  const last = samples.at(-1);
  const whole = t === run.samples && run.end;
  const spread = whole ? run.end.interval : t ? quantiles(samples, run.level) : null;
  const now = whole ? run.end : last && { ...last, ...spread };
  bars.show(samples, now && { ...spread, mean: now.mean }, !player.done);
  masks.show(last);
  network.show(run, last);
  $("scrub").value = t;
  $("count").textContent = `${t} of ${run.samples}`;
  $("masks-title").textContent = t ? `${capital(run.thin)} network ${t}` : run.thin === "noisy" ? "Without noise" : "All units on";
  verdict(now, t);
  if (now) summarise(now, samples);
}

function summarise(now, samples) {
  const { classes, most } = run;
  const chart = { samples, total: run.samples, classes, evalMode: run.eval, stratified: run.masks === "stratified" };
  meanChart($("mean-chart"), chart);
  errorChart($("error-chart"), chart);
  const best = top(now.mean);
  const error = now.standard_error?.[best];
  $("mean-text").textContent = `${classes[best]}: ${percent(now.mean[best])}; eval mode is dashed` +
    `${error == null ? "" : ", the band is the mean’s 95% interval"}.`;
  $("error-text").textContent = error == null
    ? "Takes two blocks of ten masks to know."
    : `± ${points(error)}${chart.stratified ? "; dashed: with independent masks." : "."}`;
  doubtBar($("doubt-bar"), now, most);
  $("doubt-words").textContent = doubtWords(now, most, samples.length);
  $("total").textContent = `${nats(now.predictive_entropy)} of ${figure(most)}`;
  $("expected").textContent = nats(now.expected_entropy);
  $("mutual").textContent = nats(now.mutual_information);
}

function verdict(now, t) {
  const { classes } = run;
  const plain = top(run.eval);
  const parts = ["Eval mode says ", make("b", {}, classes[plain]), ` with ${spoken(run.eval[plain])}.`];
  if (now) {
    const best = top(now.mean);
    const many = t === 1 ? `One ${run.thin} network says ` : `${t} ${run.thin} networks say `;
    parts.push(" ", many, make("b", { class: "accent" }, classes[best]), ` with ${spoken(now.mean[best])}.`);
  }
  if (!run.sites.length) parts.push(NOTHING);
  const origin = { pad: "You drew it.", file: "Your picture.", example: `The test set says ${picture.truth}.` };
  parts.push(make("span", { class: "truth small" }, origin[picture.source] ?? ""));
  say(parts);
  if (now && t === run.samples) $("spoken").textContent = `${$("verdict").innerText} ${doubtWords(now, run.most, t)}`;
}

/** Write the verdict, and once more below the pad, where a phone shows it. */
function say(parts) {
  $("verdict").replaceChildren(...parts);
  $("short-verdict").replaceChildren(...$("verdict").cloneNode(true).childNodes);
}

function controls({ playing, total, done }) {
  $("play").textContent = playing ? "Pause" : total && done ? "Again" : "Play";
  $("play").disabled = $("scrub").disabled = !total;
}

/** Leave what is shown in the background, because it answers no longer what was asked. */
function stale(words) {
  player.reset(0);
  document.body.classList.add("stale");
  say([words]);
  Object.assign($("seen"), { width: 1, height: 1 });
  $("seen-text").textContent = "Nothing yet.";
  network.show();
}

/** Say what went wrong, and what to do; `again` is what trying again means. */
function fail(error, again = look) {
  if (error.name === "AbortError") return;
  const trouble = error instanceof Trouble ? error : new Trouble("page");
  if (trouble !== error) console.error(error);
  alarm(trouble.message, trouble.hint, trouble.again && again);
}

function alarm(what, hint = "", again = null) {
  $("alert-text").replaceChildren(make("strong", {}, what), ` ${hint}`);
  $("alert-again").hidden = !again;
  retry = again;
  $("alert").hidden = false;
}

const capital = (word) => word[0].toUpperCase() + word.slice(1);
const top = (values) => values.indexOf(Math.max(...values));

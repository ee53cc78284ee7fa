// The noise at a site: read from the wire, and put into words; and how a network was trained.

import { compact, figure } from "./dom.js";

const METHODS = {
  dropout: "dropout", vanilla: "vanilla dropout", spatial: "spatial dropout", gaussian: "Gaussian dropout",
  noise: "additive Gaussian noise", dropconnect: "DropConnect", variational: "variational dropout",
  zoneout: "zoneout", depth: "stochastic depth", attention: "dropout of attention", alpha: "alpha dropout",
  feature_alpha: "alpha dropout of channels", bernoulli: "a mask that it draws itself",
};
const NETWORKS = {
  mlp: ({ hidden }) => `a fully connected network of ${hidden.join("-")} units`,
  cnn: ({ channels, hidden }) => `a convolutional network of ${channels.join("-")} channels and ${hidden.join("-")} units`,
  gru: ({ hidden }) => `a recurrent network (GRU) of ${hidden} units that reads the picture row by row`,
  wrn: ({ channels }) => `a wide residual network of ${channels.join("-")} channels`,
  vit: ({ hidden, blocks }) => `a vision transformer of ${blocks} blocks, ${hidden} units a patch`,
};
const ROWS = { gru: "steps", vit: "patches" };
const SCOPES = { batch: "the pictures of a batch shared their noise", epoch: "an epoch had one draw of its noise" };

const method = (kind) => METHODS[kind] ?? kind;
const counted = (number) => number.toLocaleString("en");
const signed = (x) => figure(x).replace("-", "−");

/** Say if a site's noise is normal numbers, and not a mask. */
export const isGaussian = ({ distribution }) => distribution === "gaussian";

/** Say if the service can put another rate in place of a site's own. */
export const turns = ({ kind, p }) => p !== null && !["alpha", "feature_alpha", "bernoulli"].includes(kind);

/** Name the module of a site; its method follows elsewhere. */
export const moduleOf = ({ name, kind }) => name.replace(`:${kind}`, "");

/** Read a site's noise of a sample from base64: a mask's bits, or the quantiles of normal numbers, 0 to 255. */
export function read(site, text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  if (isGaussian(site)) return bytes;
  const bits = new Uint8Array(site.units);
  for (let i = 0; i < bits.length; i += 1) bits[i] = (bytes[i >> 3] >> (7 - (i & 7))) & 1;
  return bits;
}

/** Find the normal number, of mean 0 and deviation 1, below which a share of all lies (Tukey's lambda). */
export const normal = (share) => (share ** 0.135 - (1 - share) ** 0.135) / 0.1975;

/** Describe a site: "DropConnect, p = 0.5, weights 256 × 785". */
export const described = (site, network) =>
  [method(site.kind), law(site), place(site, network)].filter(Boolean).join(", ");

function law({ p, mean, std, ...site }) {
  if (p === null) return `std ${compact(std)}${mean ? `, mean ${compact(mean)}` : ""}`;
  return `p\u00a0=\u00a0${compact(p)}${isGaussian(site) ? ` (mean ${compact(mean)}, std ${compact(std)})` : ""}`;
}

function place({ kind, shape }, network) {
  const [first, ...rest] = shape;
  if (kind === "depth") return "a whole branch";
  if (kind === "dropconnect") return `weights ${shape.join(" × ")}`;
  if (kind === "attention" || shape.length > 3) return shape.join(" × ");
  if (shape.length === 3) return first === 1 ? `${rest.join(" × ")} pixels` : `${first} channels of ${rest.join(" × ")}`;
  if (shape.length === 2) return first === 1 ? "the same at all steps" : `${first} ${ROWS[network] ?? "rows"} × ${rest} units`;
  return kind === "spatial" ? "whole channels" : "";
}

/** Sum up what a site drew; without values, that nothing was drawn. */
export function summary(site, values) {
  const { kind, units, mean, std } = site;
  const all = counted(units);
  if (!values) return isGaussian(site) ? `${all} units, no noise` : `all ${all} on`;
  const sum = values.reduce((a, b) => a + b, 0);
  if (!isGaussian(site)) {
    if (units === 1) return sum ? "kept" : "dropped";
    return `${counted(sum)} of ${all} ${kind === "zoneout" ? "updated" : "kept"}`;
  }
  const number = (byte) => mean + std * normal((byte + 0.5) / 256);
  const average = values.reduce((total, byte) => total + number(byte), 0) / units;
  const [low, high] = values.reduce(([a, b], byte) => [Math.min(a, byte), Math.max(b, byte)], [255, 0]);
  return `${all} numbers from ${signed(number(low))} to ${signed(number(high))}, on average ${signed(average)}`;
}

/** Say how the pictures of some sites are read. */
export function legend(sites, network) {
  const some = (...kinds) => sites.some(({ kind }) => kinds.includes(kind));
  const masks = sites.filter((site) => !isGaussian(site) && site.kind !== "zoneout");
  const others = sites.filter(({ kind }) => kind !== "dropconnect");
  return [
    others.some(({ shape: [first, ...rest], units }) => units > 1 && (first === 1 || !rest.length)) &&
      "Each square is a unit of a layer.",
    some("dropconnect") && "DropConnect: a row has the weights of one unit, its bias last.",
    others.some(({ shape }) => shape.length === 2 && shape[0] > 1) && `Rows are ${ROWS[network] ?? "rows"}, columns are units.`,
    others.some(({ shape }) => shape.length === 3 && shape[0] > 1) && "Each tile is a channel.",
    masks.length > 0 && "Filled: kept. Hollow or pale: dropped.",
    some("zoneout") && "Filled: updated. Hollow or pale: as it was a step before.",
    sites.some(isGaussian) && "Grey: a low number. In colour: a high one. Pale: near the mean.",
  ].filter(Boolean).join(" ");
}

/** Say what the drawing of a network shows of some sites. */
export function caption(sites) {
  const some = (f, words) => (sites.some(f) ? words : "");
  return sites.length ? "A few units of each layer that has noise" +
    some(({ kind }) => kind === "dropconnect", ", and the weights that are kept between them") +
    some(isGaussian, ": the larger, the larger its number") + "." : "A few units of some layers.";
}

/** Say which network a model is, and what it was trained with. */
export function about({ name, network, sites }) {
  if (!NETWORKS[network.kind]) {
    const kinds = [...new Set(sites.map(({ kind }) => method(kind)))];
    return `${name} is a network made by ${network.kind}, ${kinds.length ? `with ${kinds.join(" and ")}` : "without noise"}.`;
  }
  const { regularizer, dropout, input_dropout: input } = network;
  const added = regularizer === "noise";
  const rates = (values) => `${added ? "std" : "p ="} ${[...new Set(values)].map(compact).join(" and ")}`;
  const noise = [
    dropout.some(Boolean) && `${method(regularizer)}, ${rates(dropout)}`,
    input && `${regularizer === "dropconnect" ? "dropout" : method(regularizer)} of the input, ${rates([input])}`,
    network.noise_mean && `mean ${compact(network.noise_mean)}`,
    network.spatial_dropout && `spatial dropout, p = ${compact(network.spatial_dropout)}`,
    network.stochastic_depth && `stochastic depth, p up to ${compact(network.stochastic_depth)}`,
  ].filter(Boolean);
  const more = [
    network.batch_norm && "it has batch normalisation",
    noise.length && network.before_activation && "noise comes before the activation",
    noise.length && SCOPES[network.mask_scope],
  ].filter(Boolean);
  return [`${name} is ${NETWORKS[network.kind](network)}, trained ${noise.length ? `with ${noise.join("; ")}` : "without noise"}`,
    ...more].join("; ") + ".";
}

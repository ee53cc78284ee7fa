// Talks to the service that this page came from. Errors become words and a hint what to do.

const BASE = new URL("..", import.meta.url); // where the service's routes begin, behind a proxy too

export const address = (path) => new URL(path, BASE).href;

/** Name the routes of one version of a model. */
export function route(model, version, task) {
  const path = `v1/models/${encodeURIComponent(model)}`;
  return task === undefined ? path : `${path}/versions/${encodeURIComponent(version)}/${task}`;
}

/** What went wrong, in words for people: `message` says what, `hint` what to do about it.
 *  The API's own words are for programs; only two things in them count here: that there are too many
 *  samples (`most` is how many the service allows), and the id by which a failure is in its log. */
export class Trouble extends Error {
  constructor(status, { detail = "", request_id: id } = {}) {
    const kind = status in WORDS ? status : LIKE[status] ?? 500;
    const [message, hint] = WORDS[kind];
    super(message);
    this.hint = kind === 500 && id ? `${hint} Its number is ${id}.` : hint;
    this.status = status;
    this.again = [0, 408, 500, 503].includes(kind); // the same request may succeed later
    this.ofPicture = [413, 415, 422].includes(kind); // it never will
    this.most = Number(detail.match(/^samples: at most (\d+) here$/)?.[1] ?? NaN);
  }
}

const LIKE = { 400: 422, 429: 503, 502: 0, 504: 0 }; // all but 400 are what proxies say
const WORDS = {
  0: ["The service does not answer.", "Check your connection, and whether it is running (dropserve serve)."],
  401: ["The service asks for an API key.", "Reload the page, and give the key as the password, with any user name."],
  404: ["This model or version is not served any more.", "Reload the page to see those that are."],
  408: ["The picture took too long to arrive.", "Over a slow connection, take a smaller one."],
  413: ["This picture is too large for the service.", "Make it smaller: a thousand pixels a side are plenty."],
  415: ["The service does not read files of this kind.", "Choose a picture in PNG, JPEG or WebP."],
  422: ["This picture cannot be read.", "It may be damaged, animated, or have 16 bits a colour. Save it once more as a plain PNG or JPEG."],
  500: ["Something failed in the service.", "If it fails again, tell whoever runs it: the log says why."],
  503: ["The service is busy: too many ask at once.", "Wait a few seconds."],
  none: ["The service has no model.", "Train one with: dropserve train --dataset digits. It is found within seconds; then reload the page."],
  page: ["Something failed in this page.", "Reload it. The browser’s console says more."],
};

/** GET JSON. */
export const get = async (path, signal) => (await request(path, { signal })).json();

/** GET a picture. */
export const getBlob = async (path, signal) => (await request(path, { signal })).blob();

/** POST a picture, or a form of several, and read JSON. */
export const ask = async (path, body, query, signal) =>
  (await request(withQuery(path, query), { method: "POST", body, signal })).json();

/** POST pictures and read a prediction each; more than the service takes at once go by halves. */
export async function askAll(path, pictures, query, signal) {
  const form = new FormData();
  for (const picture of pictures) form.append("file", picture, "picture.png");
  try {
    return (await ask(path, form, query, signal)).predictions;
  } catch (error) {
    if (error.status !== 413 || pictures.length === 1) throw error;
    const middle = Math.ceil(pictures.length / 2);
    const first = await askAll(path, pictures.slice(0, middle), query, signal);
    return [...first, ...(await askAll(path, pictures.slice(middle), query, signal))];
  }
}

/** POST a picture and read server-sent events: yields `[event, data]`. */
export async function* listen(path, picture, query, signal) {
  const response = await request(withQuery(path, query), { method: "POST", body: picture, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => raise(error));
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = parse(block);
      if (found) yield found;
    }
  }
}

function parse(block) {
  const fields = { event: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) fields.event = line.slice(6).trim();
    if (line.startsWith("data:")) fields.data += line.slice(5);
  }
  return fields.data ? [fields.event, JSON.parse(fields.data)] : null;
}

export const withQuery = (path, query = {}) => {
  const text = new URLSearchParams(query).toString();
  return text ? `${path}?${text}` : path;
};

async function request(path, options) {
  const response = await fetch(address(path), options).catch(raise);
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  options.signal?.throwIfAborted();
  throw new Trouble(response.status, problem);
}

function raise(error) {
  if (error.name === "AbortError") throw error;
  throw new Trouble(0);
}

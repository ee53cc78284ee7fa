// Talks to the service that this page came from. Errors become words and a hint what to do.

const BASE = new URL("..", import.meta.url); // where the service's routes begin, behind a proxy too

export const address = (path) => new URL(path, BASE).href;

/** Name the routes of one version of a model. */
export function route(model, version, task) {
  const path = `v1/models/${encodeURIComponent(model)}`;
  return task === undefined ? path : `${path}/versions/${encodeURIComponent(version)}/${task}`;
}

/** What went wrong, in words: `title`, `message` (the service's own) and `hint` (what to do).
 *  Where that was too many thinned networks, `most` is how many the service has. */
export class Trouble extends Error {
  constructor(status, detail) {
    super(detail);
    const kind = status in WORDS ? status : status >= 500 ? 500 : 400;
    [this.title, this.hint] = WORDS[kind];
    this.status = status;
    this.most = Number(detail.match(/^samples: at most (\d+) here$/)?.[1] ?? NaN);
  }
}

const WORDS = {
  0: ["No answer", "Is it still running? Start it again with: dropserve serve"],
  400: ["Not understood", "Try another picture."],
  401: ["A key is needed", "Reload the page, and give an API key as the password."],
  404: ["Not there", "Reload the page: models may have changed since."],
  413: ["Too large", "Try a smaller picture."],
  415: ["Not a format that is read", "Choose a PNG, JPEG or WebP picture."],
  422: ["Cannot be answered", "Try another picture, or other settings."],
  500: ["The service failed", "Its log says why. Try again."],
  503: ["Busy", "Many are asking. Try again in a moment."],
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
  const detail = problem.detail ?? "The service gave no reason.";
  throw new Trouble(response.status, detail);
}

function raise(error) {
  if (error.name === "AbortError") throw error;
  throw new Trouble(0, "The service cannot be reached.");
}

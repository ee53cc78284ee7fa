// Talks to the service that this page came from. Errors become words and a hint what to do.

const BASE = new URL("..", import.meta.url); // where the service's routes begin, behind a proxy too

export const address = (path) => new URL(path, BASE).href;

/** Name the routes of one version of a model. */
export function route(model, version, task) {
  const path = `v1/models/${encodeURIComponent(model)}`;
  return task === undefined ? path : `${path}/versions/${encodeURIComponent(version)}/${task}`;
}

/** What went wrong, in words: `title`, `message` (the service's own) and `hint` (what to do). */
export class Trouble extends Error {
  constructor(status, detail) {
    super(detail);
    const kind = status in WORDS ? status : status >= 500 ? 500 : 400;
    [this.title, this.hint] = WORDS[kind];
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
export const get = async (path) => (await request(path)).json();

/** GET a picture. */
export const getBlob = async (path) => (await request(path)).blob();

/** POST a picture, or several, and read JSON. */
export async function ask(path, pictures, query, signal) {
  let body = pictures;
  if (Array.isArray(pictures)) {
    body = new FormData();
    for (const picture of pictures) body.append("file", picture, "picture.png");
  }
  return (await request(withQuery(path, query), { method: "POST", body, signal })).json();
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
  const detail = problem.detail ?? "The service gave no reason.";
  throw new Trouble(response.status, detail);
}

function raise(error) {
  if (error.name === "AbortError") throw error;
  throw new Trouble(0, "The service cannot be reached.");
}

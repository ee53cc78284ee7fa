// Where the picture comes from: the pad, a file, the clipboard, or the model's own test set.

import { askAll, get, getBlob, route } from "./api.js";
import { $, make, nats, settled } from "./dom.js";
import { Pad } from "./pad.js";

const SETTLE = 350; // milliseconds between strokes of one drawing
const EXAMPLES = 10;

export class Picture {
  /** `changed()` is called when there is another picture, or none. */
  constructor({ changed }) {
    Object.assign(this, { changed, blob: null, truth: undefined, source: null });
    const drawn = settled(() => this.#drawn(), SETTLE);
    this.pad = new Pad($("pad"), { changed: drawn, marked: () => this.#marked() });
    $("fit").addEventListener("change", () => this.source === "pad" && this.#drawn());
    $("clear").addEventListener("click", () => this.clear());
    $("file").addEventListener("change", () => {
      this.open($("file").files[0]);
      $("file").value = "";
    });
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => this.#receive(event, event.dataTransfer));
    document.addEventListener("paste", (event) => this.#receive(event, event.clipboardData));
  }

  /** Suit the pad to a model, and show its most doubtful example if there is no other picture. */
  async suit({ model, version, input, noisy }, signal) {
    this.pad.suit(input);
    this.buttons?.forEach(({ button }) => (button.disabled = true)); // they are another model's
    if (this.source === "example") Object.assign(this, { source: null, blob: null }); // so is it
    else if (this.pad.strokes.length) this.#drawn();
    else if (this.source) this.changed();
    const listed = await this.#examples(model, version, noisy, signal).catch(() => []);
    signal.throwIfAborted(); // another model has been chosen meanwhile
    this.#list(listed);
    if (this.source || this.pad.strokes.length) return;
    if (listed.length) this.#example(listed.reduce((a, b) => (a.doubt >= b.doubt ? a : b)));
    else this.clear();
  }

  /** Fetch a model's examples, and how much it doubts each, if it is noisy; null where it does not say. */
  async #examples(model, version, noisy, signal) {
    const { examples } = await get(route(model, version, "examples"), signal);
    const listed = examples.slice(0, EXAMPLES);
    if (!listed.length) return [];
    const pictures = await Promise.all(listed.map(({ url }) => getBlob(url.replace(/^\//, ""), signal)));
    const path = route(model, version, "uncertainty");
    const doubt = noisy ? await askAll(path, pictures, {}, signal).catch(() => []) : [];
    return listed.map((example, i) =>
      ({ ...example, picture: pictures[i], doubt: doubt[i]?.predictive_entropy ?? null }));
  }

  /** Show a file, whatever it is: the service says what it cannot read. */
  async open(blob, source = "file", example = null) {
    if (!blob) return;
    this.#mark(example);
    const turn = this.#take(source);
    const seen = await createImageBitmap(blob).catch(() => null);
    if (turn !== this.turn) return; // another picture has come meanwhile
    this.pad.clear(seen);
    Object.assign(this, { blob, truth: example?.label });
    this.#hint();
    this.changed();
  }

  clear() {
    this.drop();
    this.changed();
  }

  /** Forget a picture: after a service has refused it, no model is asked about it again. */
  drop() {
    this.#take(null);
    this.pad.clear();
    Object.assign(this, { blob: null, truth: undefined });
    this.#mark(null);
    this.#hint();
  }

  /** Take an example off the pad as soon as somebody draws: the drawing is what they ask about. */
  #marked() {
    if (this.source === "example") this.pad.picture = null;
    this.#mark(null);
    this.#hint();
  }

  async #drawn() {
    if (this.pad.empty) return this.clear();
    this.#mark(null);
    const turn = this.#take("pad");
    const blob = await this.pad.toBlob($("fit").checked);
    if (turn !== this.turn) return;
    Object.assign(this, { blob, truth: undefined });
    this.changed();
  }

  /** Note where the next picture comes from, and that it is the newest. */
  #take(source) {
    this.source = source;
    this.turn = (this.turn ?? 0) + 1;
    return this.turn;
  }

  #receive(event, data) {
    const file = data?.files?.[0];
    if (!file) return;
    event.preventDefault();
    this.open(file);
  }

  #list(examples) {
    $("examples").hidden = !examples.length;
    $("examples-key").hidden = examples.some((one) => one.doubt === null);
    this.buttons?.forEach(({ image }) => URL.revokeObjectURL(image.src));
    const most = Math.max(...examples.map((one) => one.doubt), 0.1);
    this.buttons = examples.map((example) => {
      const image = make("img", { src: URL.createObjectURL(example.picture), alt: example.label });
      const meter = make("i");
      meter.style.width = `${(100 * example.doubt) / most}%`;
      const title = example.label + (example.doubt === null ? "" : `, doubt ${nats(example.doubt)}`);
      const button = make("button", { type: "button", title, "aria-pressed": "false" }, image, meter);
      button.addEventListener("click", () => this.#example(example));
      return { example, button, image };
    });
    $("example-list").replaceChildren(...this.buttons.map(({ button }) => button));
  }

  #example(example) {
    return this.open(example.picture, "example", example);
  }

  #mark(example) {
    for (const one of this.buttons ?? []) {
      one.button.setAttribute("aria-pressed", String(one.example === example));
    }
  }

  #hint() {
    $("pad-hint").hidden = !this.pad.empty;
    $("pad-hint").classList.toggle("on-light", this.pad.light);
  }
}

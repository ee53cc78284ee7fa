// The drawing pad: pointer, touch and keyboard; strokes are kept as points, so that they can be
// fitted to the frame as the pictures were that the network learned from.

const SIDE = 280;
const STEP = 14;

export class Pad {
  /** `changed()` is called after each stroke, `marked()` as soon as there is something on the pad. */
  constructor(canvas, { changed, marked }) {
    Object.assign(this, { canvas, changed, marked, strokes: [], picture: null, light: false });
    this.pen = { x: SIDE / 2, y: SIDE / 2, down: false, shown: false };
    this.stroke = null;
    canvas.addEventListener("pointerdown", (event) => this.#start(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => this.#end());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => this.#show(canvas.matches(":focus-visible")));
    canvas.addEventListener("blur", () => (this.#lift(), this.#show(false)));
  }

  /** Take the shape, and the colours of paper and ink, that suit a model's input. */
  suit({ height, width, mean, invert }) {
    const bright = mean.reduce((a, b) => a + b) / mean.length > 0.5;
    this.light = bright !== invert;
    this.canvas.width = SIDE;
    this.canvas.height = Math.round((SIDE * height) / width);
    this.thick = SIDE / (width <= 12 ? 5.5 : 11); // as in scikit-learn’s digits, or as in MNIST
    this.margin = SIDE * (width <= 12 ? 0 : 0.14);
    this.render();
  }

  get empty() {
    return !this.strokes.length && !this.picture;
  }

  clear(picture = null) {
    Object.assign(this, { strokes: [], picture, stroke: null });
    this.pen.down = false;
    this.render();
  }

  /** Give what is drawn as a PNG; strokes alone are fitted to the frame if `fit`. */
  async toBlob(fit) {
    const canvas = new OffscreenCanvas(this.canvas.width, this.canvas.height);
    const move = fit && !this.picture ? this.#fitting() : (point) => point;
    this.#draw(canvas.getContext("2d"), move);
    return canvas.convertToBlob({ type: "image/png" });
  }

  render() {
    const context = this.canvas.getContext("2d");
    this.#draw(context, (point) => point);
    if (!this.pen.shown) return;
    context.beginPath();
    context.arc(this.pen.x, this.pen.y, this.thick / 2 + 3, 0, 7);
    context.lineWidth = 3;
    context.strokeStyle = this.pen.down ? "#f97316" : "#8f8a83";
    context.stroke();
  }

  #draw(context, move) {
    const { width, height } = this.canvas;
    context.fillStyle = this.light ? "#fff" : "#000";
    context.fillRect(0, 0, width, height);
    if (this.picture) {
      context.imageSmoothingEnabled = this.picture.width > 64;
      context.drawImage(this.picture, 0, 0, width, height);
    }
    context.strokeStyle = this.light ? "#000" : "#fff";
    Object.assign(context, { lineWidth: this.thick, lineCap: "round", lineJoin: "round" });
    for (const stroke of this.strokes) {
      context.beginPath();
      const [first, ...rest] = stroke.map(move);
      context.moveTo(first.x, first.y);
      for (const { x, y } of rest.length ? rest : [{ x: first.x + 0.1, y: first.y }]) context.lineTo(x, y);
      context.stroke();
    }
  }

  /** Centre the strokes and scale them to the frame less its margin; the pen keeps its width. */
  #fitting() {
    const points = this.strokes.flat();
    const [xs, ys] = [points.map((p) => p.x), points.map((p) => p.y)];
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const { width, height } = this.canvas;
    const room = this.margin + this.thick / 2;
    const scale = Math.min((width - 2 * room) / (right - left || 1), (height - 2 * room) / (bottom - top || 1), 4);
    return ({ x, y }) => ({
      x: width / 2 + (x - (left + right) / 2) * scale,
      y: height / 2 + (y - (top + bottom) / 2) * scale,
    });
  }

  #start(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#begin(this.#place(event));
  }

  #move(event) {
    if (!this.stroke || this.pen.down) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) this.stroke.push(this.#place(one));
    this.render();
  }

  #end() {
    if (!this.stroke) return;
    this.stroke = null;
    this.changed();
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * this.canvas.width) / box.width,
      y: ((event.clientY - box.top) * this.canvas.height) / box.height,
    };
  }

  #begin(point) {
    this.stroke = [point];
    this.strokes.push(this.stroke);
    this.marked();
    this.render();
  }

  #key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const { pen, canvas } = this;
    if (way) {
      pen.x = Math.min(canvas.width - 4, Math.max(4, pen.x + STEP * way[0]));
      pen.y = Math.min(canvas.height - 4, Math.max(4, pen.y + STEP * way[1]));
      if (pen.down) this.stroke.push({ x: pen.x, y: pen.y });
    } else if (event.key === " ") {
      if (pen.down) this.#lift();
      else {
        pen.down = true;
        this.#begin({ x: pen.x, y: pen.y });
      }
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
      this.changed();
    } else return;
    event.preventDefault();
    this.#show(true);
  }

  #lift() {
    if (!this.pen.down) return;
    this.pen.down = false;
    this.#end();
  }

  #show(shown) {
    this.pen.shown = shown;
    this.render();
  }
}

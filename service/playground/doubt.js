// Doubt and its two parts, drawn and put into words.

import { figure, paint } from "./dom.js";

/** Draw expected entropy and mutual information end to end; `most` nats are the whole width. */
export function doubtBar(canvas, { expected_entropy: picture, mutual_information: model }, most) {
  canvas.setAttribute("aria-label", `Doubt ${figure(picture + model)} of at most ${figure(most)}: ` +
    `${figure(picture)} from the picture, ${figure(model)} from the model`);
  paint(canvas, (context, width, height, ink) => {
    const x = (nats) => (nats / most) * width;
    context.fillStyle = ink.track;
    context.beginPath();
    context.roundRect(0, 0, width, height, 3);
    context.fill();
    context.save();
    context.clip();
    context.fillStyle = ink.grey;
    context.fillRect(0, 0, x(picture), height);
    context.fillStyle = ink.accent;
    context.fillRect(x(picture), 0, Math.max(x(model), model > 1e-4 ? 1 : 0), height);
    context.restore();
  });
}

/** Say how much doubt `count` networks have, and where from; `most` is the entropy of knowing nothing. */
export function doubtWords({ predictive_entropy: total, mutual_information: model }, most, count) {
  if (count === 1) return "One network alone: nobody to disagree with yet.";
  const share = total / most;
  if (share < 0.02) return "Next to no doubt: the networks are sure, and they agree.";
  const amount = share < 0.12 ? "A little doubt" : share < 0.4 ? "Some doubt" : share < 0.7 ? "Much doubt" : "Great doubt";
  const part = model / total;
  if (part > 0.45) return `${amount}, and ${Math.round(100 * part)}% of it because the networks disagree: the model does not know pictures like this.`;
  if (part > 0.2) return `${amount}: ${Math.round(100 * part)}% because the networks disagree, the rest because each by itself finds the picture unclear.`;
  return `${amount}, nearly all of it in the picture: the networks agree that it is unclear.`;
}

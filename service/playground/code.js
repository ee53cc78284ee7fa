// The question on the page as curl, as the Python client and as an Open Inference Protocol call.

import { address, route, withQuery } from "./api.js";
import { $, make } from "./dom.js";

export class Code {
  constructor() {
    this.buttons = Object.keys(LANGUAGES).map((name) => {
      const button = make("button", { type: "button" }, name);
      button.addEventListener("click", () => this.#choose(name));
      return { name, button };
    });
    $("languages").replaceChildren(...this.buttons.map(({ button }) => button));
    $("copy").addEventListener("click", () => this.#copy());
    this.chosen = "curl";
  }

  /** Show how to ask for `{model, version, samples, seed, masks, input, invert}`. */
  begin(picture, run) {
    this.run = run;
    URL.revokeObjectURL($("save").href);
    const kind = picture.type.split("/")[1] || "png";
    Object.assign($("save"), { href: URL.createObjectURL(picture), hidden: false, download: `picture.${kind}` });
    this.file = `picture.${kind}`;
    this.type = picture.type || "image/png";
    this.#choose(this.chosen);
  }

  #choose(name) {
    this.chosen = name;
    for (const one of this.buttons) one.button.setAttribute("aria-pressed", String(one.name === name));
    if (this.run) $("code").firstElementChild.textContent = LANGUAGES[name](this.run, this.file, this.type);
  }

  async #copy() {
    const text = $("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      $("copied").textContent = "Copied.";
    } catch { // without HTTPS there is no clipboard
      getSelection().selectAllChildren($("code"));
      $("copied").textContent = "Selected: copy it with your keyboard.";
    }
  }
}

const base = () => address("").replace(/\/$/, "");
const quoted = JSON.stringify; // is Python's syntax, too, for what can be in a name

const LANGUAGES = {
  curl: ({ model, version, samples, seed, masks }, file, type) =>
    `curl --data-binary @${file} -H 'Content-Type: ${type}' \\\n` +
    `  '${address(withQuery(route(model, version, "uncertainty"), { samples, seed, masks }))}'`,

  "Python client": ({ model, version, samples, seed, masks }, file) =>
    `from pathlib import Path

from dropserve import DropserveClient

with DropserveClient(${quoted(base())}) as client:
    answer = client.uncertainty(
        Path("${file}"), model=${quoted(model)}, version=${version},
        samples=${samples}, seed=${seed}, masks=${quoted(masks)},
    ).predictions[0]
    print(answer.label, answer.mean[answer.index], answer.mutual_information)`,

  "Open Inference Protocol": ({ model, version, samples, seed, masks }, file) =>
    `curl --data-binary @- -H 'Content-Type: application/json' \\
  '${base()}/v2/models/${encodeURIComponent(model)}/versions/${version}/infer' <<JSON
{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1],
             "data": ["$(base64 < ${file} | tr -d '\\n')"]}],
 "parameters": {"mode": "uncertainty", "samples": ${samples}, "seed": ${seed}, "masks": "${masks}"}}
JSON`,
};

"""Draws an answer of a running service: `python docs/picture.py docs/images/three.png`.

Writes `answer.svg` beside the picture: the pixels, and a bar a class with the mean of 100 thinned
networks, the interval that 90% of them lie in, and a tick where eval mode stands.
"""

import sys
from pathlib import Path

from PIL import Image

from dropserve.service.client import DropserveClient
from dropserve.service.schemas import Prediction, UncertainPrediction

STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 13px }
  .quiet { fill: #59636e } .mean { fill: #0969da } .interval { stroke: #0969da; opacity: .45 }
  .eval { stroke: #bc4c00 } .paper { fill: #fff }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .quiet { fill: #9198a1 } .mean { fill: #4493f8 }
    .interval { stroke: #4493f8 } .eval { stroke: #f0883e } .paper { fill: #0d1117 }
  }"""
CELL, ROW, LEFT, WIDTH = 22, 26, 290, 330


def draw(picture: Image.Image, eval_mode: Prediction, answer: UncertainPrediction) -> str:
    """Return the drawing as SVG."""
    pixels = [
        f'<rect x="{32 + CELL * x}" y="{70 + CELL * y}" width="{CELL}" height="{CELL}" '
        f'fill="rgb({v},{v},{v})"/>'
        for y in range(picture.height)
        for x in range(picture.width)
        for v in [int(picture.getpixel((x, y)))]  # type: ignore[arg-type]  # grey: one number
    ]
    bars = [_bar(k, eval_mode, answer) for k in range(len(answer.mean))]
    words = (
        f"Monte Carlo dropout says {answer.label} ({answer.mean[answer.index]:.0%}); "
        f"eval mode alone says {eval_mode.label} ({eval_mode.probability:.0%})"
    )
    doubt = (
        f"doubt {answer.predictive_entropy:.2f} nats = {answer.expected_entropy:.2f} from the data "
        f"+ {answer.mutual_information:.2f} from the model"
    )
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 380" role="img">',
            f"<title>{words}; {doubt}</title><style>{STYLE}</style>",
            '<rect class="paper" width="720" height="380" rx="8"/>',
            f'<text x="32" y="38">{words}</text>',
            *pixels,
            *bars,
            f'<text class="small quiet" x="32" y="{70 + CELL * 8 + 30}">the picture, 8 x 8</text>',
            f'<text class="small" x="32" y="362">{doubt}</text>',
            '<text class="small quiet" x="470" y="362">bar: mean, line: 90%, tick: eval</text>',
            "</svg>\n",
        ]
    )


def _bar(k: int, eval_mode: Prediction, answer: UncertainPrediction) -> str:
    y = 82 + ROW * k
    at = [
        LEFT + WIDTH * p
        for p in (
            answer.mean[k],
            answer.interval.lower[k],
            answer.interval.upper[k],
            eval_mode.probabilities[k],
        )
    ]
    return (
        f'<text x="{LEFT - 18}" y="{y + 5}">{k}</text>'
        f'<rect class="mean" x="{LEFT}" y="{y - 7}" width="{at[0] - LEFT:.1f}" height="14" rx="2"/>'
        f'<line class="interval" x1="{at[1]:.1f}" x2="{at[2]:.1f}" y1="{y}" y2="{y}" '
        f'stroke-width="4" stroke-linecap="round"/>'
        f'<line class="eval" x1="{at[3]:.1f}" x2="{at[3]:.1f}" y1="{y - 10}" y2="{y + 10}" '
        f'stroke-width="2"/>'
        f'<text class="small quiet" x="{LEFT + WIDTH + 20}" y="{y + 5}">{answer.mean[k]:.1%}</text>'
    )


def main(path: Path) -> None:
    """Ask the service about a grey picture and write the drawing beside it."""
    with DropserveClient() as client:
        eval_mode = client.predict(path).predictions[0]
        answer = client.uncertainty(path).predictions[0]
    with Image.open(path) as picture:
        drawing = draw(picture.convert("L"), eval_mode, answer)
    path.with_name("answer.svg").write_text(drawing)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

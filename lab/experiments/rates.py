"""Which rate, in which layer?"""

from itertools import product

from dropserve.lab.experiment import Experiment, Panel, Setting, Table
from dropserve.lab.measures import trained

RATES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
GRID = (0.0, 0.2, 0.5, 0.8)
BESIDE = (0.2, 0.5)
INPUT = (0.1, 0.2, 0.3, 0.5)


def _hidden(first: float, second: float) -> Setting:
    values = {"first": first, "second": second}
    if (first, second) == BESIDE:
        values["input"] = 0.0
    return Setting(f"{first:g} and {second:g}", {"dropout": (first, second)}, {}, values)


FIRST = [_hidden(p, 0.0) for p in RATES]
SECOND = [_hidden(0.0, p) for p in RATES]
BOTH = [_hidden(first, second) for first, second in product(GRID, GRID)]
ON_INPUT = [
    Setting(f"input {p:g}", {"dropout": BESIDE, "input_dropout": p}, {}, {"input": p})
    for p in INPUT
]


def _labels(settings: list[Setting]) -> list[str]:
    return [setting.label for setting in settings]


EXPERIMENT = Experiment(
    question="Which dropout rate, and in which layer?",
    setup=(
        (
            "An MLP of two hidden layers of 128 units; rates from 0 to .99 in one layer with 0 in "
            "the other, a grid of both, and 0 to .5 on the input beside .2 and .5."
        ),
        "10,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test images.",
        "AdamW for 30 epochs, learning rate .001 with a half cosine.",
    ),
    settings=[*{s.label: s for s in (*FIRST, *SECOND, *BOTH, *ON_INPUT)}.values()],
    measure=trained,
    tables=[
        Table(["accuracy", "train_accuracy", "nll"], against="0 and 0"),
        Table(
            ["accuracy", "nll"],
            {
                "swapped: .5 and .2 - .2 and .5": "0.5 and 0.2 - 0.2 and 0.5",
                "swapped: .8 and .2 - .2 and .8": "0.8 and 0.2 - 0.2 and 0.8",
                "swapped: .8 and .5 - .5 and .8": "0.8 and 0.5 - 0.5 and 0.8",
                "input: .1 - 0": "input 0.1 - 0.2 and 0.5",
                "input: .2 - 0": "input 0.2 - 0.2 and 0.5",
                "input: .5 - 0": "input 0.5 - 0.2 and 0.5",
            },
        ),
    ],
    panels=[
        Panel("First layer, the second without", ["train_accuracy", "accuracy"], "first",
              rows=_labels(FIRST), x_title="rate"),
        Panel("Second layer, the first without", ["train_accuracy", "accuracy"], "second",
              rows=_labels(SECOND), x_title="rate"),
        Panel("Both", "accuracy", "second", "first", _labels(BOTH),
              x_title="rate of the second layer"),
        Panel("On the input, beside .2 and .5", ["train_accuracy", "accuracy"], "input",
              rows=["0.2 and 0.5", *_labels(ON_INPUT)], x_title="rate on the input"),
    ],
    answer=(
        "For accuracy low ones: .2 or .3 in the first layer changes it by {accuracy[0.2 and 0 - "
        "0 and 0]} and {accuracy[0.3 and 0 - 0 and 0]} points, .3 in the second by {accuracy[0 "
        "and 0.3 - 0 and 0]}, .2 in both by {accuracy[0.2 and 0.2 - 0 and 0]}; for NLL higher "
        "ones: .5 in the first by {nll[0.5 and 0 - 0 and 0]} nats, .7 in the second by {nll[0 "
        "and 0.7 - 0 and 0]}, and .2 on the input beside .2 and .5 by another {nll[input 0.2 - "
        "0.2 and 0.5]}; a high rate does less harm in the second layer (.8 and .2 against .2 "
        "and .8: {accuracy[0.8 and 0.2 - 0.2 and 0.8]} points; .5 and .2 swapped show no "
        "difference). Training accuracy falls with every rate; test accuracy is below that "
        "without dropout from .7 on in the first layer ({accuracy[0.7 and 0 - 0 and 0]}) and .8 "
        "in the second ({accuracy[0 and 0.8 - 0 and 0]}), and collapses at .9 in the first "
        "({accuracy[0.9 and 0]}%) and at .99 in the second ({accuracy[0 and 0.99]}%)."
    ),
    answered="e23a628adac6",
)  # fmt: skip

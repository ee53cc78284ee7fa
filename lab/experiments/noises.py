"""What is the noise put on, how often is it drawn, and need it be a mask?"""

import copy
from itertools import product
from typing import Any

import torch
from torch import nn

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.measures import ROUNDING, scores
from dropserve.lab.run import Run
from dropserve.models.regularizers import InvertedDropout, Scope

CHECKED = 100
"""Images, on which masks of units and of weights are compared."""
RATES = (0.2, 0.5)
"""Of masks on weights, rows and columns."""
OTHER_RATES = (0.1, 0.3, 0.5)
STDS = (0.2, 0.5, 1.0)
SCOPES: tuple[Scope, ...] = ("example", "batch", "epoch")


def measure(run: Run) -> Figures:
    """Train and score; compare masks of units with masks of rows and columns."""
    run.train(lambda _module, epoch: {"held_outs": epoch.validation_accuracy})
    return {
        **scores(run),
        **run.curves,
        "held_out": run.curves["held_outs"][-1],
        "as_rows": as_weights(run, "rows"),
        "as_columns": as_weights(run, "columns"),
    }


def as_weights(run: Run, place: str) -> float | None:
    """Compare a pass with dropped units to one of eval mode with dropped rows or columns.

    A row of a layer's weights with its bias makes a unit, a column reads one: to drop units is to
    drop the rows of the layer before, as ReLU maps 0 to 0, or the columns of the layer after.
    Returns the largest difference of logits, over the largest logit, in float64 and in units of
    `ROUNDING`; None: units are not dropped, or have no layer before.
    """
    module = copy.deepcopy(run.module)
    if not isinstance(module, nn.Sequential):
        return None
    named = [*module.double().named_children()]
    linear = [(i, name) for i, (name, layer) in enumerate(named) if isinstance(layer, nn.Linear)]
    dropping = [
        (i, layer) for i, (_, layer) in enumerate(named) if isinstance(layer, InvertedDropout)
    ]
    if not dropping or (place == "rows" and dropping[0][0] < linear[0][0]):
        return None
    for _, layer in dropping:
        layer.scope, layer.of_epoch = "epoch", None  # one mask, which it keeps
    x = run.normalize(run.test.images[:CHECKED]).double()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        expected = module.train()(x)
        tensors = module.state_dict()
        for i, layer in dropping:
            if layer.of_epoch is None:
                raise ValueError("no mask was drawn")
            mask = layer.of_epoch.flatten()
            if place == "rows":
                name = [name for j, name in linear if j < i][-1]
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * mask[:, None]
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"] * mask
            else:
                name = next(name for j, name in linear if j > i)
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * mask
        got = torch.func.functional_call(module.eval(), tensors, x)
    return float((got - expected).abs().max() / expected.abs().max()) / ROUNDING


def _place(name: str, rate: float) -> Setting:
    """Drop parts of the weights of both hidden layers, a mask a batch."""
    networks: dict[str, dict[str, Any]] = {
        "weights": {"regularizer": "dropconnect", "dropout": (rate, rate)},
        "rows": {"dropout": (rate, rate)},
        "columns": {"input_dropout": rate, "dropout": (rate, 0.0)},
    }
    network = {**networks[name], "mask_scope": "batch"}
    return Setting(f"{name}, {rate:g}", network, {}, {"rate": rate, "place": name})


def _scope(on: str, scope: Scope) -> Setting:
    method = "dropout" if on == "units" else "dropconnect"
    network = {
        "hidden": (128, 64), "regularizer": method, "dropout": (0.0, 0.5), "mask_scope": scope,
    }  # fmt: skip
    return Setting(f"{on}, a mask per {scope}", network, {}, {"scope": scope, "on": on})


def _noise(name: str, regularizer: str, rate: float) -> Setting:
    network = {"regularizer": regularizer, "dropout": (rate, rate)}
    return Setting(f"{name} {rate:g}", network, {}, {"noise": name, "strength": rate})


NONE = Setting("no noise", {"dropout": (0.0,)})
NONE_64 = Setting("no noise, 64 units", {"hidden": (128, 64), "dropout": (0.0,)})
PLACES = [_place(name, rate) for rate, name in product(RATES, ("weights", "rows", "columns"))]
DRAWN = [_scope(on, scope) for on, scope in product(("units", "weights"), SCOPES)]
NOISES = [
    *(_noise("dropout", "dropout", p) for p in OTHER_RATES),
    *(_noise("gaussian dropout", "gaussian", p) for p in OTHER_RATES),
    *(_noise("additive noise", "noise", std) for std in STDS),
]


def _labels(*settings: Setting) -> list[str]:
    return [setting.label for setting in settings]


_FIGURES = ["accuracy", "train_accuracy", "nll", "held_out"]
EXPERIMENT = Experiment(
    question="DropConnect, masks per batch, Gaussian or additive noise: does any beat dropout?",
    setup=(
        (
            "An MLP of two hidden layers of 128 units. Masks per batch on the weights of both "
            "(DropConnect), on their rows with biases, which is on their units, or on their "
            "columns, which is on the input and the first layer's units, at rates .2 and .5. Then"
            " with 64 units in the second layer, and noise at .5 in that alone, a new mask per "
            "example, per batch or per epoch. Then per example in both layers of 128: dropout and"
            " Gaussian dropout at .1, .3 and .5, and additive noise of standard deviation .2, .5 "
            "and 1."
        ),
        "10,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test images.",
        "AdamW for 30 epochs, learning rate .001 with a half cosine.",
    ),
    settings=[NONE, *PLACES, NONE_64, *DRAWN, *NOISES],
    measure=measure,
    measures={
        "held_out": Measure("accuracy on images held out, %", 2, percent=True),
        "as_rows": Measure("difference to dropped rows, over the largest logit, 1e-16", 1),
        "as_columns": Measure("difference to dropped columns, over the largest logit, 1e-16", 1),
    },
    tables=[
        Table(_FIGURES, _labels(NONE, *PLACES), against="no noise"),
        Table(
            ["accuracy", "train_accuracy", "nll"],
            [
                f"{first}, {rate:g} - {second}, {rate:g}"
                for rate, (first, second) in product(
                    RATES, (("weights", "rows"), ("weights", "columns"), ("columns", "rows"))
                )
            ],
        ),
        Table(
            ["as_rows", "as_columns"],
            [f"{place}, {rate:g}" for place, rate in product(("rows", "columns"), RATES)],
        ),
        Table(_FIGURES, _labels(NONE_64, *DRAWN), against="no noise, 64 units"),
        Table(
            ["accuracy", "train_accuracy", "nll"],
            [
                *(f"{on}, a mask per {scope} - {on}, a mask per example"
                  for on, scope in product(("units", "weights"), SCOPES[1:])),
                *(f"weights, a mask per {scope} - units, a mask per {scope}" for scope in SCOPES),
            ],
        ),
        Table(_FIGURES, _labels(NONE, *NOISES), against="no noise"),
        Table(
            ["accuracy", "train_accuracy", "nll"],
            [f"gaussian dropout {p:g} - dropout {p:g}" for p in OTHER_RATES],
        ),
    ],
    panels=[
        Panel("Weights, rows or columns, a mask a batch", "accuracy",
              rows=_labels(NONE, *PLACES)),
        Panel("Second layer alone, .5", "accuracy", rows=_labels(NONE_64, *DRAWN)),
        Panel("Other noises, drawn per example", "accuracy", rows=_labels(NONE, *NOISES)),
        Panel("NLL of the test images", "nlls", x_title="epoch",
              rows=["no noise", "weights, 0.5", "rows, 0.5", "columns, 0.5", "dropout 0.5"]),
    ],
    answer=(
        "At its best rate dropout is not beaten in accuracy: Gaussian dropout shows no "
        "difference at any rate (.1: {accuracy[gaussian dropout 0.1 - dropout 0.1]} points), "
        "additive noise gains nothing over none (.5: {accuracy[additive noise 0.5 - no "
        "noise]}), and DropConnect, with a mask a batch for both, is the weaker regularizer: "
        "worse than dropped rows at .2 ({accuracy[weights, 0.2 - rows, 0.2]}), less harmful at "
        ".5 ({accuracy[weights, 0.5 - rows, 0.5]}), where the rate is too high. Dropping rows "
        "or columns of weights is dropping units, to rounding; a mask a batch in place of one "
        "an example costs accuracy ({accuracy[units, a mask per batch - units, a mask per "
        "example]}) but lowers the NLL ({nll[units, a mask per batch - units, a mask per "
        "example]}), and one an epoch costs more ({accuracy[units, a mask per epoch - units, a "
        "mask per example]}; with masks of weights {accuracy[weights, a mask per epoch - "
        "weights, a mask per example]})."
    ),
    answered="6e6e775ed8eb",
)  # fmt: skip

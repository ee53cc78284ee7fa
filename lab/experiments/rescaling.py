"""Why are kept units divided by 1-p?"""

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.measures import activations, probabilities, scores, thinned
from dropserve.lab.run import Run
from dropserve.models import checkpoint
from dropserve.models.conversion import converted
from dropserve.models.evaluation import score
from dropserve.models.regularizers import Bernoulli, Stochastic

RATES = (0.2, 0.5, 0.8)
OTHERS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Rates at which a trained network is run."""
SAMPLES = 30
IMAGES, PASSES = 500, 50
"""Test images on which activations are compared, and passes of them in train mode."""
LAYERS = {"units": "dropout1", "sums": "hidden2", "logits": "logits"}


def measure(run: Run) -> Figures:
    """Train; then run the network with other scales and rates, and with its dropout removed."""
    module = run.train()
    removed, vanilla = _changed(module, 0.0), run.setting.values["convention"] == "vanilla"
    figures = {**scores(run), **run.curves}
    figures |= _ratios(run, module, module, "")
    figures |= _ratios(run, _changed(module, rescaled=False), removed, "bare_")
    figures |= _scored(run, _changed(module, rescaled=vanilla), "swapped")
    figures |= _scored(run, removed, "removed") | _scored(run, _converted(run), "converted")
    samples = 3 if run.quick else SAMPLES
    curves: dict[str, list[float]] = {}
    for p in OTHERS:
        other = _changed(module, p)
        found = _scored(run, other, "eval")
        found |= _scored(run, other, "mc", samples) if p else {
            name.replace("eval", "mc"): value for name, value in found.items()
        }  # fmt: skip
        for name, value in found.items():
            curves.setdefault(f"{name}_by_rate", []).append(value)
            if p in RATES:
                figures[f"{name}_at_{100 * p:.0f}"] = value
    return figures | curves | {"others": [*OTHERS]}


def _changed(
    module: nn.Module, p: float | None = None, *, rescaled: bool | None = None
) -> nn.Module:
    """Copy a network, with another rate, or with kept units divided by 1-p or not."""
    changed = copy.deepcopy(module).eval()
    for layer in changed.modules():
        if isinstance(layer, Stochastic) and isinstance(layer.law, Bernoulli):
            layer.p = layer.law.p if p is None else p
            rescales = layer.law.rescaled if rescaled is None else rescaled
            layer.law = replace(layer.law, rescaled=rescales)
    return changed


def _converted(run: Run) -> nn.Module:
    """Remove the dropout of the trained network, with weights that make up for it."""
    with TemporaryDirectory() as folder:
        run.publish(Path(folder), "trained")
        version = checkpoint.read(Path(folder) / "trained" / "1")
        return converted(version, {}, remove=True)[0].eval()


def _scored(run: Run, module: nn.Module, name: str, samples: int = 0) -> Figures:
    images, normalize = run.test.images, run.normalize
    if samples:
        p = thinned(module, images, normalize, samples, run.seed, "independent").mean(0)
    else:
        p = probabilities(module, images, normalize)
    found = score(p, run.test.labels)
    return {f"{name}_accuracy": found["accuracy"], f"{name}_nll": found["nll"]}


def _ratios(run: Run, trained: nn.Module, evaluated: nn.Module, prefix: str) -> Figures:
    """Return how much larger activations are in eval mode than in train mode, on average.

    Units are not negative, so that is a ratio of means. Weighted sums of them (without biases) may
    be: their means over the passes in train mode are regressed on those of eval mode.
    """
    passes = 2 if run.quick else PASSES
    x = run.normalize(run.test.images[:IMAGES])
    found = {}
    for name, layer in LAYERS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            noisy = activations(trained.train(), x.repeat(passes, 1, 1, 1), layer)
        trained.eval()
        mean = noisy.double().view(passes, len(x), -1).mean(0)
        plain = activations(evaluated.eval(), x, layer).double()
        if name == "units":
            ratio = plain.mean() / mean.mean()
        else:
            bias = _bias(evaluated, layer)
            mean, plain = mean - bias, plain - bias
            ratio = plain.square().sum() / (plain * mean).sum()
        found[f"{prefix}{name}"] = float(ratio)
    return found


def _bias(module: nn.Module, layer: str) -> Tensor:
    found = module.get_submodule(layer).bias
    if not isinstance(found, Tensor):
        raise TypeError(f"{layer} has no bias")
    return found.detach().double()


def _labels(*conventions: str) -> list[str]:
    return [f"{name}, {p:g}" for name, p in product(conventions, RATES)]


REGULARIZERS = {"inverted": "dropout", "vanilla": "vanilla"}
_ALL = _labels(*REGULARIZERS)
_KINDS = {"eval": "eval mode", "mc": f"mean over {SAMPLES} masks"}
EXPERIMENT = Experiment(
    question="Why 1/(1-p), and may p change, or the layer go, after training?",
    setup=(
        (
            "An MLP of two hidden layers of 128 units, both with rate .2, .5 or .8, trained with "
            "inverted dropout (kept units divided by 1-p) or vanilla (units multiplied by 1-p in "
            "eval mode). Then run with the other's eval mode, without dropout layers, and at "
            "rates of 0 to .9, in eval mode and with the mean over 30 masks; activations of 500 "
            "test images, in train mode over 50 passes."
        ),
        "10,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test images.",
        "AdamW for 30 epochs, learning rate .001 with a half cosine.",
    ),
    settings=[
        Setting(
            f"{name}, {p:g}",
            {"regularizer": regularizer, "dropout": (p, p)},
            {},
            {
                "convention": name,
                "rate": p,
                "others": OTHERS,
                "samples": SAMPLES,
                "test_images": IMAGES,
                "passes": PASSES,
            },
        )
        for (name, regularizer), p in product(REGULARIZERS.items(), RATES)
    ],
    measure=measure,
    measures={
        "units": Measure("units, eval over train", 3),
        "sums": Measure("sums into layer 2, eval over train", 3),
        "logits": Measure("sums into logits, eval over train", 3),
        "bare_units": Measure("units, no factor anywhere", 3),
        "bare_sums": Measure("sums into layer 2, no factor anywhere", 3),
        "bare_logits": Measure("sums into logits, no factor anywhere", 3),
        "swapped_accuracy": Measure("accuracy in the other's eval mode, %", 2, percent=True),
        "swapped_nll": Measure("NLL in the other's eval mode, nats", 3),
        "removed_accuracy": Measure("accuracy without the layers, %", 2, percent=True),
        "removed_nll": Measure("NLL without the layers, nats", 3),
        "converted_accuracy": Measure("the same, weights converted, %", 2, percent=True),
        "converted_nll": Measure("the same, weights converted, nats", 3),
        "others": Measure("rate after training", 2),
        **{
            f"{kind}_{name}_{suffix}": Measure(f"{title}, {said}{at}", digits, percent)
            for kind, said in _KINDS.items()
            for name, title, digits, percent in (
                ("accuracy", "accuracy, %", 2, True),
                ("nll", "NLL, nats", 3, False),
            )
            for suffix, at in (
                ("by_rate", ""),
                *((f"at_{100 * p:.0f}", f", p = {p:g}") for p in RATES),
            )
        },
    },
    tables=[
        Table(["units", "sums", "logits", "bare_units", "bare_sums", "bare_logits"]),
        Table(["accuracy", "swapped_accuracy", "nll", "swapped_nll"]),
        Table(["accuracy", "removed_accuracy", "converted_accuracy", "nll", "removed_nll",
               "converted_nll"]),
        *(
            Table([f"{kind}_{name}_at_{100 * p:.0f}" for kind, p in product(_KINDS, RATES)])
            for name in ("accuracy", "nll")
        ),
        Table(["accuracy", "nll"], [f"vanilla, {p:g} - inverted, {p:g}" for p in RATES]),
    ],
    panels=[
        Panel("Inverted: accuracy at other rates in eval mode", "eval_accuracy_by_rate", "others",
              rows=_labels("inverted"), x_title="p after training"),
        Panel("Vanilla: accuracy at other rates in eval mode", "eval_accuracy_by_rate", "others",
              rows=_labels("vanilla"), x_title="p after training"),
        Panel(f"Accuracy of the mean over {SAMPLES} masks, trained at .5", "mc_accuracy_by_rate",
              "others", rows=["inverted, 0.5", "vanilla, 0.5"], x_title="p after training"),
        Panel("NLL in eval mode, trained at .5", "eval_nll_by_rate", "others",
              rows=["inverted, 0.5", "vanilla, 0.5"], x_title="p after training", log="y"),
    ],
    answer=(
        "Without the factor, units and sums in eval mode are 1/(1-p) times as large as in "
        "training ({bare_units[inverted, 0.5]} at .5), and logits through two layers "
        "{bare_logits[inverted, 0.5]} times; that hardly moves the accuracy of vanilla dropout "
        "({removed_accuracy[vanilla, 0.5]}% without it, {accuracy[vanilla, 0.5]}% with it), but "
        "its NLL is {removed_nll[vanilla, 0.5]} in place of {nll[vanilla, 0.5]}, and an "
        "inverted network scaled down by mistake loses accuracy at .8 "
        "({swapped_accuracy[inverted, 0.8]}% in place of {accuracy[inverted, 0.8]}%). With "
        "inverted dropout p may be changed and the layers removed after training, as eval mode "
        "stays the same (NLL {removed_nll[inverted, 0.5]}), but not the mean over masks: from "
        ".5 to .8 its NLL goes from {mc_nll_at_50[inverted, 0.5]} to {mc_nll_at_80[inverted, "
        "0.5]}; with vanilla dropout eval mode changes, too, unless the weights are converted "
        "({converted_nll[vanilla, 0.5]}) as `dropserve convert` does, and it trains worse at .5 "
        "and .8 ({accuracy[vanilla, 0.8 - inverted, 0.8]} points)."
    ),
    answered="1a4a490bac1e",
)  # fmt: skip

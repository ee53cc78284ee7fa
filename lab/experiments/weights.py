"""What do dropout and weight decay do to weights and hidden units?"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.measures import activations, scores
from dropserve.lab.run import Run

DECAY = 0.5
NEAR_ZERO, HE = 0.01, 0.0505  # sqrt(2/784)
WIDTHS = (64, 128, 256, 512, 1024)
WIDTH_EPOCHS = 15
DELETED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the first hidden layer's units."""
DRAWS = 3
"""Of the units that are deleted, which accuracies are the mean of."""
NONE: dict[str, Any] = {"dropout": (0.0,)}
DROPOUT: dict[str, Any] = {"dropout": (0.2, 0.5)}


def measure(run: Run) -> Figures:
    """Train, and look at the first hidden layer, in eval mode on the test images."""
    module, values = run.build(), run.setting.values
    layers = dict(module.named_children())
    weight, following = module.get_parameter("hidden1.weight"), layers.get("hidden2")
    outgoing = (following or layers["logits"]).get_parameter("weight")
    if values.get("init") == "half":
        with torch.no_grad():
            weight[: len(weight) // 2] *= NEAR_ZERO / HE
    started = _participation(weight)
    run.train(module=module)
    units = activations(module.eval(), run.normalize(run.test.images), "hidden1_relu")
    spread = units.std(0)
    contributions = spread * outgoing.detach().norm(dim=0)
    figures = scores(run) | {
        "participation_start": started,
        "participation": _participation(weight),
        "participation_next": _participation(outgoing),
        "correlation": _correlation(units[:, spread > 0]),
        "active": float((units > 0).float().mean()),
        "dead": float((units == 0).all(0).float().mean()),
        "used": _participation(contributions[None]),
        **_deletions(run, module, units),
    }
    if "init" in values:
        half = contributions[: len(contributions) // 2].sum()
        figures["half_share"] = float(half / contributions.sum())
    return figures


def _participation(weights: Tensor) -> float:
    """Return how evenly rows of weights [N, n] are spread: 1/n to 1, the mean of all rows.

    A row of zeros counts as 0.
    """
    squares = weights.detach().double().square()
    ratios = squares.sum(1).square() / squares.square().sum(1).clamp_min(1e-300)
    return float(ratios.mean()) / weights.shape[1]


def _correlation(units: Tensor) -> float:
    """Return the mean absolute correlation of pairs of units [N, n], n at least 2."""
    found = torch.corrcoef(units.double().T).abs()
    count = len(found)
    return float((found.sum() - count) / (count * (count - 1)))


@torch.inference_mode()
def _deletions(run: Run, module: nn.Module, units: Tensor) -> Figures:
    """Measure accuracy without some first-layer units; the others as they are, or scaled up."""
    names = [name for name, _ in module.named_children()]
    rest = list(module.children())[names.index("hidden1_relu") + 1 :]
    width, generator = units.shape[1], run.generator(1)
    found: dict[str, list[list[float]]] = {"deleted_accuracies": [], "rescaled_accuracies": []}
    for _ in range(DRAWS):
        order = torch.randperm(width, generator=generator)
        for accuracies in found.values():
            accuracies.append([])
        for share in DELETED:
            kept = torch.ones(width)
            kept[order[: round(share * width)]] = 0
            for accuracies, scale in zip(
                found.values(), (1.0, float(width / kept.sum())), strict=True
            ):
                x = units * (kept * scale)
                for layer in rest:
                    x = layer(x)
                accuracies[-1].append(float((x.argmax(1) == run.test.labels).float().mean()))
    means = {name: torch.tensor(lists).mean(0).tolist() for name, lists in found.items()}
    middle = DELETED.index(0.5)
    lost = {f"{name.split('_')[0]}_loss": one[middle] - one[0] for name, one in means.items()}
    return {"deleted": list(DELETED), **means, **lost}


def _settings() -> Iterator[Setting]:
    decay = {"weight_decay": DECAY}
    yield Setting("none", NONE)
    yield Setting("dropout", DROPOUT)
    yield Setting("weight decay", NONE, decay)
    yield Setting("both", DROPOUT, decay)
    yield Setting("input dropout", {**NONE, "input_dropout": 0.2})
    for init, (name, network) in product(
        ("near zero", "He", "half"), (("none", NONE), ("dropout", DROPOUT))
    ):
        std = NEAR_ZERO if init == "near zero" else HE
        label = f"{name}, half near zero" if init == "half" else f"{name}, {init}"
        yield Setting(label, {**network, "init_std": std}, {}, {"init": init})
    for width, (name, rate) in product(WIDTHS, (("none", 0.0), ("dropout", 0.5))):
        network = {"hidden": (width,), "dropout": (rate,)}
        values = {"width": width, "network": name}
        yield Setting(f"{name}, width {width}", network, {"epochs": WIDTH_EPOCHS}, values)


SETTINGS = [replace(s, values={**s.values, "draws": DRAWS}) for s in _settings()]
BASE = [s.label for s in SETTINGS if not {"init", "width"} & s.values.keys()]
INITS = [s.label for s in SETTINGS if "init" in s.values]
WIDE = [s.label for s in SETTINGS if "width" in s.values]
SPREAD = ["participation", "participation_next", "correlation", "active", "dead"]
EXPERIMENT = Experiment(
    question="Does dropout spread weights, and make hidden units sparse, redundant and used?",
    setup=(
        (
            "An MLP of two hidden layers of 128 units: without anything, with dropout of rates .2 "
            "and .5, with weight decay .5, with both, and with dropout of .2 on the input alone; "
            "with fresh weights of standard deviation .01 (near zero), .0505 (He's for the first "
            "layer, in all layers), and .0505 but .01 for the weights into the first half of the "
            "first layer's units. For width, one hidden layer of 64 to 1024 units, with dropout "
            "of .5 and without."
        ),
        (
            "10,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test "
            "images. AdamW without weight decay where none is said, for 30 epochs, for width for "
            "15, learning rate .001 with a half cosine."
        ),
        (
            "All of the first hidden layer, in eval mode on the test images. Participation ratio "
            "of a unit's n weights: (sum of squares)^2 / (n sum of fourth powers), 1/n for one "
            "weight and 1 where all are equal, the mean of all units. A unit's contribution: "
            "standard deviation of its activation times the norm of its outgoing weights. Accuracy "
            "without a random half of the units is the mean of 3 draws."
        ),
    ),
    settings=SETTINGS,
    measure=measure,
    measures={
        "participation_start": Measure("the same before training, %", 1, percent=True),
        "participation": Measure("participation ratio of incoming weights, %", 1, percent=True),
        "participation_next": Measure("participation ratio, next layer, %", 1, percent=True),
        "correlation": Measure("mean absolute correlation of units", 3),
        "active": Measure("active units, %", 1, percent=True),
        "dead": Measure("never active units, %", 1, percent=True),
        "used": Measure("participation ratio of the units' contributions, %", 1, percent=True),
        "half_share": Measure("contribution of the first half of the units, %", 1, percent=True),
        "deleted": Measure("share deleted"),
        "deleted_accuracies": Measure("test accuracy, %", 1, percent=True),
        "rescaled_accuracies": Measure("test accuracy, %", 1, percent=True),
        "deleted_loss": Measure("change of accuracy with half of the units, points", 2, True),
        "rescaled_loss": Measure("the same, the others doubled, points", 2, percent=True),
    },
    recipe={"weight_decay": 0.0},
    tables=[
        Table(["accuracy", *SPREAD], BASE, "none", SPREAD[:3]),
        Table(["deleted_loss", "rescaled_loss"], [*BASE, *WIDE], None),
        Table(
            ["accuracy", "participation", "participation_start", "dead", "used", "half_share"],
            [*INITS, *(f"{a} - {b}" for a, b in zip(INITS[1::2], INITS[::2], strict=True))],
        ),
        Table(
            ["accuracy", "gap", "nll", *SPREAD[:4]],
            [
                *WIDE,
                *(f"{a} - {b}" for a, b in zip(WIDE[1::2], WIDE[::2], strict=True)),
                *(f"{a} - {b}" for a, b in zip(WIDE[3::2], WIDE[:-2:2], strict=True)),
            ],
        ),
    ],
    panels=[
        Panel("Units of the first layer deleted", "deleted_accuracies", "deleted", rows=BASE,
              x_title="share of units deleted"),
        Panel("The same, the others scaled up", "rescaled_accuracies", "deleted", rows=BASE,
              x_title="share of units deleted"),
        Panel("Weights and units", ["participation", "participation_next", "active"], rows=BASE),
        Panel("One hidden layer", "accuracy", "width", "network", x_title="units", log="x"),
    ],
    answer=(
        "It spreads the first layer's weights less evenly (participation ratio "
        "{participation[dropout - none]} points), those of the next layer a little more "
        "({participation_next[dropout - none]}; weight decay concentrates them, "
        "{participation_next[weight decay - none]}), and its units are sparser "
        "({active[dropout]}% active, {active[none]}% without), less correlated "
        "({correlation[dropout - none]}) and more redundant: without half of them accuracy "
        "changes by {deleted_loss[dropout]} points, without dropout by {deleted_loss[none]}. "
        "Units that start near zero are used in both cases; where half of them do, their share "
        "of the contribution is {half_share[dropout, half near zero - none, half near zero]} "
        "points higher with dropout; at equal width dropout of .5 costs accuracy after 15 "
        "epochs at every width ({accuracy[dropout, width 64 - none, width 64]} points at 64 "
        "units, {accuracy[dropout, width 1024 - none, width 1024]} at 1024, where the NLL is "
        "lower, {nll[dropout, width 1024 - none, width 1024]})."
    ),
    answered="e926b1732990",
)  # fmt: skip

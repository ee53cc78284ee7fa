"""Is dropout an ensemble? Srivastava et al. (JMLR 2014) and Lakshminarayanan et al. (NIPS 2017)."""

from copy import copy
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.measures import probabilities, thinned
from dropserve.lab.run import Run
from dropserve.models.evaluation import score

NONE, DROPOUT = {"dropout": (0.0,)}, {"dropout": (0.2, 0.5)}
NETWORKS, SAMPLES = 5, 100
COUNTS = (1, 2, 3, 4, 5, 10, 20, 50, 100)
PAIRED = 20
"""Members of which every two are compared, where there are more."""


def measure(run: Run) -> Figures:
    """Train the networks; score the mean of all members, and compare them two by two."""
    values = run.setting.values
    samples = min(values.get("samples", 0), 10 if run.quick else SAMPLES)
    # The run's own network comes last: it is the one that is published.
    runs = [*(_other(run, i) for i in range(1, values["networks"])), run]
    found = [_members(one.train(), one, samples) for one in runs]
    if len(found) > 1 and samples:
        found = [members.mean(0, keepdim=True) for members in found]
    members, labels = torch.cat(found[::-1]).double(), run.test.labels
    single = [score(p, labels) for p in members[:PAIRED]]
    figures: Figures = {
        **score(members.mean(0), labels),
        "member_accuracy": sum(one["accuracy"] for one in single) / len(single),
        "member_nll": sum(one["nll"] for one in single) / len(single),
    }
    if len(members) > 1:
        counts = [count for count in COUNTS if count <= len(members)]
        means = [score(members[:count].mean(0), labels) for count in counts]
        figures |= _pairs(members[:PAIRED]) | {
            "counts": [float(count) for count in counts],
            "accuracy_by_count": [one["accuracy"] for one in means],
            "nll_by_count": [one["nll"] for one in means],
        }
    return figures


def _other(run: Run, number: int) -> Run:
    """Return the run with weights and an order of its own, and the same images."""
    other = copy(run)
    other.data, other.seed = run.data, run.seed + 1000 * number
    return other


def _members(module: nn.Module, run: Run, samples: int) -> Tensor:
    """Return what the network, or its thinned networks, say of the test images: [members, N, C].

    Masks are independent, as the weights of networks are.
    """
    images, normalize = run.test.images, run.normalize
    if samples:
        return thinned(module, images, normalize, samples, run.seed, "independent")
    return probabilities(module, images, normalize)[None]


def _pairs(members: Tensor) -> Figures:
    """Compare every two members, which does not depend on their number; means over pairs."""
    classes, entropies = members.argmax(-1), _entropy(members)
    pairs = list(combinations(range(len(members)), 2))
    differ = sum(float((classes[i] != classes[j]).double().mean()) for i, j in pairs)
    divergence = sum(
        float((_entropy((members[i] + members[j]) / 2) - (entropies[i] + entropies[j]) / 2).mean())
        for i, j in pairs
    )
    return {"disagreement": differ / len(pairs), "divergence": divergence / len(pairs)}


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy


def _setting(label: str, network: dict[str, Any], networks: int = 1, samples: int = 0) -> Setting:
    values = {"networks": networks} | ({"samples": samples} if samples else {})
    return Setting(label, network, {}, values)


EXPERIMENT = Experiment(
    question="Is dropout an ensemble, and as good as an ensemble of networks trained apart?",
    setup=(
        (
            "MLPs of two hidden layers of 128 units, without dropout and with rates .2 and .5; 5 "
            "networks with other weights and orders of the same images, the means of 5 and 100 "
            "thinned networks of one (independent masks), and of 5 networks' means of 20 thinned "
            "ones each. Disagreement and divergence are means over all pairs of (at most 20) "
            "members: networks, or thinned networks; in the last case, networks' means."
        ),
        "10,000 images of Fashion-MNIST, all but one of them trained on; all 10,000 test images.",
        "AdamW for 30 epochs, learning rate .001 with a half cosine.",
    ),
    settings=[
        _setting("one network", NONE),
        _setting("dropout, eval mode", DROPOUT),
        _setting("Monte Carlo, T=5", DROPOUT, 1, 5),
        _setting("Monte Carlo, T=100", DROPOUT, 1, SAMPLES),
        _setting("5 networks", NONE, NETWORKS),
        _setting("5 dropout networks", DROPOUT, NETWORKS),
        _setting("5 dropout networks, T=20 each", DROPOUT, NETWORKS, 20),
    ],
    measure=measure,
    measures={
        "member_accuracy": Measure("test accuracy of a member, %", 2, percent=True),
        "member_nll": Measure("test NLL of a member, nats", 3),
        "disagreement": Measure("two members disagree on, %", 2, percent=True),
        "divergence": Measure("Jensen-Shannon divergence of two members, nats", 4),
        "counts": Measure("members", 0),
        "accuracy_by_count": Measure("test accuracy, %", 2, percent=True),
        "nll_by_count": Measure("test NLL, nats", 3),
    },
    recipe={"validation_share": 1e-4},
    tables=[
        Table(["accuracy", "nll", "brier", "ece"], None, "one network", ["accuracy", "nll", "ece"]),
        Table(
            ["member_accuracy", "member_nll", "disagreement", "divergence"],
            ["Monte Carlo, T=5", "Monte Carlo, T=100", "5 networks", "5 dropout networks",
             "5 dropout networks, T=20 each"],
        ),
        Table(
            ["accuracy", "nll", "ece"],
            {
                "Monte Carlo, T=100 - eval mode": "Monte Carlo, T=100 - dropout, eval mode",
                "5 networks - Monte Carlo, T=5": "5 networks - Monte Carlo, T=5",
                "5 networks - Monte Carlo, T=100": "5 networks - Monte Carlo, T=100",
                "5 dropout networks - 5 networks": "5 dropout networks - 5 networks",
                "5 dropout networks: T=20 each - eval mode":
                    "5 dropout networks, T=20 each - 5 dropout networks",
            },
        ),
    ],
    panels=[
        Panel("Mean of all members", "accuracy"),
        Panel("Mean of all members: NLL", "nll"),
        Panel("Accuracy by members", "accuracy_by_count", "counts",
              rows=["Monte Carlo, T=100", "5 networks", "5 dropout networks"],
              x_title="members", log="x"),
        Panel("Two members", "disagreement",
              rows=["Monte Carlo, T=100", "5 networks", "5 dropout networks",
                    "5 dropout networks, T=20 each"]),
    ],
    answer=(
        "In part: the mean over 100 thinned networks of one network is as accurate as 5 "
        "networks trained apart (these: {accuracy[5 networks - Monte Carlo, T=100]} points; at "
        "5 passes for both {accuracy[5 networks - Monte Carlo, T=5]}) and has better "
        "probabilities (ECE {ece[Monte Carlo, T=100]}%, 5 networks {ece[5 networks]}%), though "
        "dropout in eval mode is as accurate as that mean ({accuracy[Monte Carlo, T=100 - "
        "dropout, eval mode]}). Its members are weaker ({member_accuracy[Monte Carlo, T=100]}%, "
        "networks {member_accuracy[5 networks]}%) and disagree more (two of them on "
        "{disagreement[Monte Carlo, T=100]}% of the images, networks on {disagreement[5 "
        "networks]}%); 5 dropout networks in eval mode are {accuracy[5 dropout networks - 5 "
        "networks]} points better than 5 without, and with 20 masks each they have the lowest "
        "NLL ({nll[5 dropout networks, T=20 each]}), for {accuracy[5 dropout networks, T=20 "
        "each - 5 dropout networks]} points."
    ),
    answered="dc7301a2780f",
)  # fmt: skip

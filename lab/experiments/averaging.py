"""Why not average over masks at test time, in place of weight scaling?"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.measures import ROUNDING, probabilities, scores, thinned
from dropserve.lab.run import Run
from dropserve.models.evaluation import score
from dropserve.models.regularizers import InvertedDropout

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 14, 20, 30, 50, 70, 100, 140, 200)
DRAWN = 400
"""Independent samples of a run: a T takes disjoint groups of them, `GROUPS` or what there are."""
GROUPS = 40
SHOWN = (10, 50)
"""T of the table."""
_BATCH = 100


def measure(run: Run) -> Figures:
    """Train; score eval mode and means over T masks, and of a tiny network the mean over all."""
    module = run.train()
    plain, labels = scores(run), run.test.labels
    drawn, sizes = (40, [t for t in SIZES if t <= 20]) if run.quick else (DRAWN, [*SIZES])
    found = thinned(module, run.test.images, run.normalize, drawn, run.seed, "independent")
    exact, figures = None, {**plain}
    if run.setting.values["tiny"]:
        exact, geometric = every_mask(module, run.normalize(run.test.images))
        scaled = probabilities(module, run.test.images, run.normalize)
        for name, mean in {"exact": exact, "geometric": geometric}.items():
            scored = score(mean, labels)
            figures |= {f"{name}_accuracy": scored["accuracy"], f"{name}_nll": scored["nll"]}
        figures["geometric_difference"] = _geometric_difference(run, module)
        figures["scaled_distance"] = distance(scaled, exact)
    accuracies, nlls, distances = list[float](), list[float](), list[float]()
    for size in sizes:
        groups = range(min(drawn // size, GROUPS))
        means = [found[i * size : (i + 1) * size].double().mean(0) for i in groups]
        scored_means = [score(mean, labels) for mean in means]
        accuracies.append(sum(one["accuracy"] for one in scored_means) / len(groups))
        nlls.append(sum(one["nll"] for one in scored_means) / len(groups))
        if exact is not None:
            distances.append(sum(distance(mean, exact) for mean in means) / len(groups))
    accuracy_gains = [value - plain["accuracy"] for value in accuracies]
    nll_gains = [value - plain["nll"] for value in nlls]
    if exact is not None:
        far = figures["scaled_distance"]
        figures |= {
            "distances": distances,
            "scaled_distances": [far for _ in sizes],
            "distance_from": first_from([each <= far for each in distances], sizes),
        }
    return figures | {
        "sizes": [float(size) for size in sizes],
        "mc_accuracies": accuracies,
        "mc_nlls": nlls,
        "accuracy_gains": accuracy_gains,
        "nll_gains": nll_gains,
        "single_accuracy": accuracies[0],
        "single_nll": nlls[0],
        "mc_accuracy": accuracies[-1],
        "mc_nll": nlls[-1],
        "accuracy_gain": accuracy_gains[-1],
        "nll_gain": nll_gains[-1],
        **{f"accuracy_gain_{t}": accuracy_gains[sizes.index(t)] for t in SHOWN if t in sizes},
        "nll_from": first_from([gain <= 0 for gain in nll_gains], sizes),
    }


def first_from(holds: Sequence[bool], sizes: Sequence[int]) -> float | None:
    """Return the T from which on something holds for all; None: not for the last."""
    failed = max((i for i, each in enumerate(holds) if not each), default=-1)
    return float(sizes[failed + 1]) if failed + 1 < len(sizes) else None


def distance(p: Tensor, q: Tensor) -> float:
    """Return the total variation between probabilities [N, C], the mean over images."""
    return float((p.double() - q).abs().sum(1).mean() / 2)


@torch.inference_mode()
def every_mask(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run an MLP with each mask that there is, on normalised images x [N, ...].

    Returns the arithmetic and the normalised geometric mean of the probabilities, weighted by how
    probable a mask is: [N, C] each, float64.
    """
    arithmetic, geometric = [], []
    for batch in torch.split(x.flatten(1), _BATCH):
        h, shares = batch[:, None], torch.ones(1, dtype=torch.float64)  # h is [B, masks, units]
        for layer in module.children():
            if isinstance(layer, InvertedDropout):
                units = torch.arange(h.shape[-1])
                kept = (torch.arange(2 ** len(units))[:, None] >> units & 1).double()
                dropped = layer.law.p or 0.0
                share = (kept * (1 - dropped) + (1 - kept) * dropped).prod(1)
                h = (h[:, :, None] * (kept * layer.law.kept).to(h)).flatten(1, 2)
                shares = (shares[:, None] * share).flatten()
            elif not isinstance(layer, nn.Flatten):
                h = layer(h)
        log_p = h.double().log_softmax(-1)
        arithmetic.append(torch.einsum("m,bmc->bc", shares, log_p.exp()))
        geometric.append(torch.einsum("m,bmc->bc", shares, log_p).softmax(-1))
    return torch.cat(arithmetic), torch.cat(geometric)


@torch.inference_mode()
def _geometric_difference(run: Run, module: nn.Module) -> float:
    """Compare eval mode with the geometric mean of all masks, in float64: in units of rounding."""
    exact, x = copy.deepcopy(module).double(), run.normalize(run.test.images[:_BATCH]).double()
    return float((every_mask(exact, x)[1] - exact(x).softmax(-1)).abs().max()) / ROUNDING


def _network(label: str, hidden: tuple[int, ...], dropout: tuple[float, ...]) -> Setting:
    tiny = sum(hidden) <= 12
    values = {"tiny": tiny, "sizes": SIZES, "samples": DRAWN, "groups": GROUPS}
    values |= {"masks": 2 ** sum(hidden)} if tiny else {}
    return Setting(label, {"hidden": hidden, "dropout": dropout}, {}, values)


WIDE = [
    _network("rates .2 and .5", (128, 128), (0.2, 0.5)),
    _network("rates .5 and .5", (128, 128), (0.5, 0.5)),
]
TINY = [
    _network("12 units, rate .2", (12,), (0.2,)),
    _network("12 units, rate .5", (12,), (0.5,)),
    _network("6 and 6 units, rate .2", (6, 6), (0.2, 0.2)),
]
_WIDE, _TINY = ([setting.label for setting in settings] for settings in (WIDE, TINY))

EXPERIMENT = Experiment(
    question="Why not drop units at test time, too, and average: from how many masks on?",
    setup=(
        (
            "An MLP of two hidden layers of 128 units, with rates .2 and .5 or .5 and .5: eval "
            "mode against means over T = 1 to 200 independent masks, averaged over up to 40 "
            "groups of T out of 400 samples. Tiny ones, of 12 units in a layer at .2 or .5, or of"
            " 6 and 6 at .2, also with all 4,096 masks, weighted by their probabilities."
        ),
        "10,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test images.",
        "AdamW for 30 epochs, learning rate .001 with a half cosine.",
    ),
    settings=[*WIDE, *TINY],
    measure=measure,
    measures={
        "single_accuracy": Measure("accuracy of a single pass, %", 2, percent=True),
        "single_nll": Measure("NLL of a single pass, nats", 3),
        "mc_accuracy": Measure("accuracy of the mean over 200, %", 2, percent=True),
        "mc_nll": Measure("NLL of the mean over 200, nats", 3),
        "mc_accuracies": Measure("accuracy of the mean over T, %", 2, percent=True),
        "mc_nlls": Measure("NLL of the mean over T, nats", 3),
        "accuracy_gain": Measure("accuracy, mean over 200 less eval mode, points", 2, percent=True),
        "nll_gain": Measure("NLL, mean over 200 less eval mode, nats", 4),
        "accuracy_gains": Measure("accuracy, mean over T less eval mode, points", 2, percent=True),
        "nll_gains": Measure("NLL, mean over T less eval mode, nats", 3),
        **{
            f"accuracy_gain_{t}": Measure(f"mean over {t} less eval mode, points", 2, percent=True)
            for t in SHOWN
        },
        "nll_from": Measure("T from which on NLL is no higher than eval mode's", 1),
        "exact_accuracy": Measure("accuracy of the mean over all masks, %", 2, percent=True),
        "exact_nll": Measure("NLL of the mean over all masks, nats", 4),
        "geometric_accuracy": Measure("accuracy of the geometric mean, %", 2, percent=True),
        "geometric_nll": Measure("NLL of the geometric mean, nats", 4),
        "geometric_difference": Measure(
            "largest difference of a probability, geometric mean and eval mode, 1e-16", 0
        ),
        "scaled_distance": Measure("total variation, eval mode and the mean over all masks", 4),
        "scaled_distances": Measure("eval mode", 4),
        "distances": Measure("mean over T masks", 4),
        "distance_from": Measure("T from which on the mean is nearer to that over all", 1),
        "sizes": Measure("T", 0),
    },
    tables=[
        Table(
            ["accuracy", "single_accuracy", "accuracy_gain_10", "accuracy_gain_50", "accuracy_gain"]
        ),
        Table(["nll", "single_nll", "mc_nll", "nll_gain", "nll_from"]),
        Table(["accuracy", "exact_accuracy", "geometric_accuracy"], _TINY),
        Table(
            ["nll", "exact_nll", "geometric_nll", "scaled_distance", "distance_from"], _TINY
        ),
        Table(["geometric_difference"], _TINY[:2]),
    ],
    panels=[
        Panel("Accuracy against that of eval mode", "accuracy_gains", "sizes", rows=_WIDE,
              x_title="T", log="x"),
        Panel("NLL against that of eval mode", "nll_gains", "sizes", rows=_WIDE,
              x_title="T", log="x"),
        Panel("12 units: total variation to the mean over all masks",
              ["distances", "scaled_distances"], "sizes", rows=["12 units, rate .5"],
              x_title="T", log="xy"),
        Panel("Tiny networks: NLL against that of eval mode", "nll_gains", "sizes", rows=_TINY,
              x_title="T", log="x"),
    ],
    answer=(
        "Because accuracy does not gain: the mean over 10 masks changes it by "
        "{accuracy_gain_10[rates .2 and .5]} points against eval mode, over 50 by "
        "{accuracy_gain_50[rates .2 and .5]}, over 200 by {accuracy_gain[rates .2 and .5]} "
        "(rates .2 and .5), and a single pass has {single_accuracy[rates .2 and .5]}% in place "
        "of {accuracy[rates .2 and .5]}%; the probabilities do gain, the NLL by {nll_gain[rates "
        ".2 and .5]} nats with 200, and from {nll_from[rates .2 and .5]} masks on they are "
        "better than those of weight scaling ({nll_from[rates .5 and .5]} at .5 and .5). In "
        "tiny networks, where the exact mean over all 4,096 masks is known, weight scaling is "
        "the geometric mean (with one hidden layer to rounding) and has a far lower NLL than "
        "the exact mean ({nll[12 units, rate .5]} against {exact_nll[12 units, rate .5]} for 12 "
        "units at .5): there it is a predictor of its own, not an approximation that more masks "
        "improve on."
    ),
    answered="6a8f438a1b7b",
)  # fmt: skip

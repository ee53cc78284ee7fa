"""Dropout and other regularizers: do their gains add up?"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.measures import ROUNDING, trained
from dropserve.lab.run import Run
from dropserve.models import training
from dropserve.models.data import Split

DROPOUT = {"dropout": (0.2, 0.5)}
DECAYS = (1e-5, 1e-3, 0.02, 0.1, 0.5, 2.0)
WITH_BIASES = (0.02, 0.5, 2.0)
COMBINED = (0.02, 0.5, 2.0)
L1 = (1e-5, 1e-4, 1e-3)
COMBINED_L1 = 1e-4
MAX_NORM = 1.0
STEPS = 50
"""Steps after which weights with a decay and weights with a penalty are compared again."""


def measure(run: Run) -> Figures:
    """Train and score; where the setting asks for it, compare weight decay with its prior."""
    figures = trained(run)
    if run.module is not None and run.setting.values.get("prior"):
        figures |= _prior(run, run.module)
    return figures


def _prior(run: Run, module: nn.Module) -> Figures:
    """Compare weight decay L with the log density of a normal prior of variance 1/L.

    By its gradient at the trained weights, and by steps of the project's optimizers from them, with
    the decay or with the penalty L/2 |w|^2 in the loss. In float64; the network's own copy stays.
    """
    decay = run.recipe().weight_decay
    module = copy.deepcopy(module).double()
    weights = [w.detach().requires_grad_() for w in _matrices(module)]
    prior = Normal(torch.tensor(0.0, dtype=torch.float64), decay**-0.5)
    densities = [prior.log_prob(w).sum() for w in weights]  # type: ignore[no-untyped-call]
    gradients = torch.autograd.grad(torch.stack(densities).sum(), weights)
    pairs = [(g, -decay * w.detach()) for g, w in zip(gradients, weights, strict=True)]
    figures: Figures = {
        "prior_difference": max(float((g - d).abs().max()) for g, d in pairs) / ROUNDING,
        "prior_relative": max(float(((g - d) / d).abs().max()) for g, d in pairs) / ROUNDING,
    }
    for optimizer, unit in (("sgd", ROUNDING), ("adamw", 1.0)):
        plain, decayed, penalised = (
            list(_walk(run, module, optimizer, *both)) for both in ((0, 0), (decay, 0), (0, decay))
        )
        for name, i in (("step", 0), ("steps", -1)):
            moved = (decayed[i] - plain[i]).norm()
            figures[f"{optimizer}_{name}"] = (
                float((decayed[i] - penalised[i]).norm() / moved) / unit
            )
    return figures


def _walk(
    run: Run, module: nn.Module, optimizer: str, decay: float, penalty: float
) -> Iterator[Tensor]:
    """Yield all weights after each step from a network's; the same batches each time."""
    module = copy.deepcopy(module).eval()
    recipe = run.recipe(optimizer=optimizer, weight_decay=float(decay))
    steps = training.build_optimizer(module, recipe)  # what `fit` steps by
    train, generator = run.train_images, run.generator(1)
    for _ in range(3 if run.quick else STEPS):
        drawn = torch.randint(len(train), (recipe.batch_size,), generator=generator)
        steps.zero_grad()
        loss = _loss(run, module, train.take(drawn)) + penalty / 2 * _square(module)
        loss.backward()  # type: ignore[no-untyped-call]
        steps.step()
        yield torch.cat([w.detach().flatten() for w in module.parameters()])


def _loss(run: Run, module: nn.Module, batch: Split) -> Tensor:
    return F.cross_entropy(module(run.normalize(batch.images).double()), batch.labels)


def _square(module: nn.Module) -> Tensor:
    return torch.stack([w.square().sum() for w in _matrices(module)]).sum()


def _matrices(module: nn.Module) -> list[Tensor]:
    """Return the weights that a decay is for: no biases."""
    return [w for w in module.parameters() if w.dim() > 1]


def _settings() -> Iterator[Setting]:
    none = {"dropout": (0.0,)}
    yield Setting("neither", none)
    yield Setting("dropout", DROPOUT)
    for decay in DECAYS:
        prior = {"prior": True, "steps": STEPS} if decay in COMBINED else {}
        values = {"decay": decay, "biases": "biases not decayed", **prior}
        yield Setting(f"decay {decay:g}", none, {"weight_decay": decay}, values)
    for decay in WITH_BIASES:
        recipe = {"weight_decay": decay, "decay_biases": True}
        values = {"decay": decay, "biases": "biases decayed"}
        yield Setting(f"decay {decay:g} with biases", none, recipe, values)
    for decay in COMBINED:
        values = {"decay": decay, "biases": "with dropout"}
        yield Setting(f"decay {decay:g} and dropout", DROPOUT, {"weight_decay": decay}, values)
    for l1 in L1:
        yield Setting(f"L1 {l1:g}", none, {"l1": l1})
    yield Setting(f"L1 {COMBINED_L1:g} and dropout", DROPOUT, {"l1": COMBINED_L1})
    yield Setting(
        f"L1 {COMBINED_L1:g} and decay 0.5", none, {"l1": COMBINED_L1, "weight_decay": 0.5}
    )
    yield Setting("max-norm", none, {"max_norm": MAX_NORM})
    yield Setting("max-norm and dropout", DROPOUT, {"max_norm": MAX_NORM})
    yield Setting("batch norm", {**none, "batch_norm": True})
    yield Setting("batch norm and dropout", {**DROPOUT, "batch_norm": True})
    yield Setting("dropout before ReLU", {**DROPOUT, "before_activation": True})
    gaussian = {**DROPOUT, "regularizer": "gaussian"}
    yield Setting("Gaussian dropout", gaussian)
    yield Setting("Gaussian dropout before ReLU", {**gaussian, "before_activation": True})


def _interactions() -> Iterator[tuple[str, str]]:
    """Yield what each of a pair gains on top of the other, less what it gains alone."""
    others = [f"decay {decay:g}" for decay in COMBINED]
    for other in (*others, f"L1 {COMBINED_L1:g}", "max-norm", "batch norm"):
        yield f"{other} alone", f"{other} - neither"
        yield (
            f"{other}, interaction with dropout",
            (f"{other} and dropout - {other} - dropout + neither"),
        )


SETTINGS = [*_settings()]
L1_DECAY = f"L1 {COMBINED_L1:g} and decay 0.5 - L1 {COMBINED_L1:g} - decay 0.5 + neither"
EXPERIMENT = Experiment(
    question="Do weight decay, L1, max-norm or batch norm add to dropout, or replace it?",
    setup=(
        (
            "An MLP of two hidden layers of 128 units, with and without dropout of rates .2 and "
            ".5; weight decay from .00001 to 2, L1 from .00001 to .001, a max-norm of 1 on each "
            "unit's weights, batch norm, and noise before or after ReLU. Settings without a decay "
            "in their name have none; that of .00001 moves no weight by as much as float32 rounds."
        ),
        (
            "10,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test "
            "images. AdamW for 30 epochs, learning rate .001 with a half cosine."
        ),
        (
            "An interaction is what both gain, less what each gains alone: 0 if the gains add up, "
            "below 0 for an accuracy if they overlap. The prior of a weight decay L is normal "
            "with mean 0 and variance 1/L. Steps with the decay are compared with steps of the "
            "penalty's gradient, after 1 and after 50, in float64 without noise: the "
            "distance of their weights in units of how far the decay alone has moved them."
        ),
    ),
    settings=SETTINGS,
    measure=measure,
    measures={
        "prior_difference": Measure("log prior's gradient, largest difference, 1e-16", 2),
        "prior_relative": Measure("the same, relative to each weight's, 1e-16", 2),
        "sgd_step": Measure("SGD, decay against penalty, 1 step, 1e-16", 1),
        "sgd_steps": Measure("SGD, 50 steps, 1e-16", 1),
        "adamw_step": Measure("AdamW, decay against penalty, 1 step", 1),
        "adamw_steps": Measure("AdamW, 50 steps", 1),
    },
    recipe={"weight_decay": 0.0},
    tables=[
        Table(["accuracy", "gap", "nll"], against="neither", compared=["accuracy", "nll"]),
        Table(
            ["accuracy", "gap", "nll"],
            {
                "dropout alone": "dropout - neither",
                **dict(_interactions()),
                "L1, interaction with decay 0.5": L1_DECAY,
            },
        ),
        Table(
            ["accuracy", "nll"],
            {
                f"{one} - {other}": f"{one} - {other}"
                for one, other in (
                    *((f"decay {d:g} with biases", f"decay {d:g}") for d in WITH_BIASES),
                    ("batch norm", "dropout"),
                    ("batch norm and dropout", "dropout"),
                    ("batch norm and dropout", "batch norm"),
                    ("max-norm and dropout", "dropout"),
                    ("dropout before ReLU", "dropout"),
                    ("Gaussian dropout before ReLU", "Gaussian dropout"),
                )
            },
        ),
        Table(
            ["prior_difference", "prior_relative", "sgd_step", "sgd_steps", "adamw_step",
             "adamw_steps"],
            [f"decay {decay:g}" for decay in COMBINED],
        ),
    ],
    panels=[
        Panel("Weight decay", "accuracy", "decay", "biases", x_title="weight decay", log="x"),
        Panel("Weight decay: NLL", "nll", "decay", "biases", x_title="weight decay", log="x"),
        Panel(
            "Interaction with dropout", "accuracy",
            rows={
                shown.replace(", interaction with dropout", ""): expression
                for shown, expression in _interactions() if "interaction" in shown
            },
        ),
        Panel("Other regularizers", ["train_accuracy", "accuracy"],
              rows=[s.label for s in SETTINGS if "decay" not in s.label]),
    ],
    answer=(
        "For NLL weight decay replaces dropout: dropout changes it by {nll[dropout - neither]} "
        "nats, decay .5 by {nll[decay 0.5 - neither]}, both by {nll[decay 0.5 and dropout - "
        "neither]}; for accuracy it does not ({accuracy[decay 0.5 - neither]} points, dropout "
        "{accuracy[dropout - neither]}), and there the interactions of dropout with decay .5 "
        "and 2, L1 and max-norm are below 0, too, decay .02 does nearly nothing, and batch norm "
        "alone raises the NLL ({nll[batch norm - neither]}), which dropout undoes. Dropout "
        "before ReLU is dropout after it (the difference is 0 in every run), and decaying "
        "biases changes nothing that 5 seeds can show; the gradient of weight decay is that of "
        "a Gaussian prior up to rounding, and with SGD the steps agree, too, but not with "
        "AdamW: with the penalty in the loss its weights end {adamw_steps[decay 0.5]} times as "
        "far away after 50 steps as decay .5 has moved them."
    ),
    answered="6cce0d1bcd35",
)  # fmt: skip

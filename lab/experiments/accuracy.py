"""Does dropout raise test accuracy?"""

from itertools import product

import numpy as np

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.measures import trained
from dropserve.lab.run import Run

EPOCHS = 100
LOSS = 0.3
"""Training NLL that is to be reached, nats."""
LEARNING_RATES = (1e-4, 1e-3, 3e-3, 1e-2)
NETWORKS = {"no dropout": (0.0,), "dropout": (0.2, 0.5)}


def measure(run: Run) -> Figures:
    """Train; then look at the curves: how they jump, whether the test error falls twice."""
    figures = trained(run)
    errors = 1 - np.array(run.curves["accuracies"])
    smooth = np.convolve(errors, np.full(5, 0.2), "valid") if len(errors) > 5 else errors
    first = int(smooth[: len(smooth) // 2 + 1].argmin())
    peak = first + int(smooth[first:].argmax())
    reached = [i for i, loss in enumerate(run.curves["train_nlls"], 1) if loss <= LOSS]
    return figures | {
        "jump": float(np.abs(np.diff(errors[-len(errors) // 2 - 1 :])).mean()),
        "rise": float(smooth[peak] - smooth[first]),
        "second_fall": float(smooth[peak] - smooth[peak:].min()),
        "epochs_to_loss": float(reached[0]) if reached else None,
    }


def _settings() -> list[Setting]:
    found = []
    for rate, (name, dropout) in product(LEARNING_RATES, NETWORKS.items()):
        recipe = {"epochs": EPOCHS, "schedule": "constant", "learning_rate": rate}
        values = {"rate": rate, "network": name}
        found.append(Setting(f"{name}, constant {rate:g}", {"dropout": dropout}, recipe, values))
    for epochs, (name, dropout) in product((10, 50, EPOCHS), NETWORKS.items()):
        label = f"{name}, cosine over {epochs} epochs"
        found.append(Setting(label, {"dropout": dropout}, {"epochs": epochs}, {"network": name}))
    return found


EXPERIMENT = Experiment(
    question="Does dropout raise test accuracy, and what does it cost in epochs?",
    setup=(
        "An MLP of two hidden layers of 128 units, without dropout and with rates .2 and .5.",
        "10,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test images.",
        "AdamW for 100 epochs at a constant learning rate, or a half cosine over 10, 50 and 100.",
    ),
    settings=_settings(),
    measure=measure,
    measures={
        "jump": Measure("mean change from epoch to epoch, points", 2, percent=True),
        "rise": Measure("rise of the smoothed test error, points", 2, percent=True),
        "second_fall": Measure("its fall after that, points", 2, percent=True),
        "epochs_to_loss": Measure(f"epochs to a training NLL (eval mode) of {LOSS}", 1),
    },
    tables=[
        Table(["train_accuracy", "accuracy", "kept_accuracy", "gap", "nll"]),
        Table(["epochs_to_loss", "jump", "rise", "second_fall"]),
        Table(
            ["accuracy", "kept_accuracy", "gap", "nll", "epochs_to_loss", "jump"],
            {
                label.replace("dropout, ", "dropout - none, "): f"{label} - no {label}"
                for label in (s.label for s in _settings() if s.values["network"] == "dropout")
            },
        ),
    ],
    panels=[
        Panel(
            "Constant learning rate 0.001",
            "accuracies",
            rows=["no dropout, constant 0.001", "dropout, constant 0.001"],
            x_title="epoch",
        ),
        Panel(
            "The same",
            "nlls",
            rows=["no dropout, constant 0.001", "dropout, constant 0.001"],
            x_title="epoch",
        ),
        Panel(
            "Jumps of the test accuracy", "jump", "rate", "network",
            x_title="constant learning rate", log="x",
        ),
        Panel("After the last epoch", "accuracy", "rate", "network",
              x_title="constant learning rate", log="x"),
    ],
    answer=(
        "It depends on the schedule: with a half cosine over 50 epochs dropout changes the "
        "accuracy by {accuracy[dropout, cosine over 50 epochs - no dropout, cosine over 50 "
        "epochs]} points (at the best validation epoch by {kept_accuracy[dropout, cosine over "
        "50 epochs - no dropout, cosine over 50 epochs]}), over 10 by {accuracy[dropout, cosine "
        "over 10 epochs - no dropout, cosine over 10 epochs]}, at a constant learning rate of "
        "0.01 by {accuracy[dropout, constant 0.01 - no dropout, constant 0.01]}; its gap is "
        "smaller in all of them, and the same training loss, where it is reached, takes "
        "{epochs_to_loss[dropout, constant 0.001 - no dropout, constant 0.001]} (constant "
        "0.001) to {epochs_to_loss[dropout, constant 0.0001 - no dropout, constant 0.0001]} "
        "epochs (0.0001) more. The curves jump by {jump[no dropout, constant 0.0001]} points an "
        "epoch (with dropout {jump[dropout, constant 0.0001]}) at 0.0001 and by {jump[no "
        "dropout, constant 0.01]} ({jump[dropout, constant 0.01]}) at 0.01, and at 0.001 "
        "without dropout the smoothed test error rises by {rise[no dropout, constant 0.001]} "
        "points after its first minimum and falls again by {second_fall[no dropout, constant "
        "0.001]}, with dropout by {rise[dropout, constant 0.001]} and {second_fall[dropout, "
        "constant 0.001]}: a second descent, but a small one."
    ),
    answered="af748e99485f",
)  # fmt: skip

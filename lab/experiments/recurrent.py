"""Which noise suits a recurrent network?"""

from typing import Any

from dropserve.lab.experiment import Experiment, Panel, Setting, Table
from dropserve.lab.measures import trained

RATES = (0.1, 0.3)
METHODS: dict[str, dict[str, Any]] = {
    "naive": {"regularizer": "dropout"},
    "variational": {"regularizer": "variational"},
    "dropconnect": {"regularizer": "dropconnect", "mask_scope": "batch"},
    "zoneout": {"regularizer": "zoneout"},
    "gaussian": {"regularizer": "gaussian"},
}


def _settings() -> list[Setting]:
    found = [Setting("none", {"dropout": (0.0,)}, {}, {"method": "none", "rate": 0.0})]
    for name, network in METHODS.items():
        for p in RATES:
            values = {"method": name, "rate": p}
            found.append(Setting(f"{name} {p:g}", {**network, "dropout": (p,)}, {}, values))
    return found


def _differences(name: str, other: str) -> list[str]:
    return [f"{name} {p:g} - {other} {p:g}" for p in RATES]


EXPERIMENT = Experiment(
    question="Dropout in a GRU: a new mask a step, one for all steps, on weights, or zoneout?",
    setup=(
        (
            "A GRU of 64 units reads an image row by row. Rates .1 and .3, of the inputs and the "
            "state alike: masks drawn anew at every step (naive, and Gaussian noise of the same "
            "variance), masks shared by all steps (variational), masks on the weights shared by a "
            "batch (DropConnect); or of the state's update alone (zoneout). All measured in eval "
            "mode."
        ),
        "6,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test images.",
        "AdamW for 20 epochs with batches of 64, learning rate .003 with a half cosine.",
    ),
    settings=_settings(),
    measure=trained,
    network={"kind": "gru", "hidden": (64,)},
    recipe={"epochs": 20, "batch_size": 64, "learning_rate": 3e-3},
    images=6_000,
    seeds=3,
    tables=[
        Table(
            ["accuracy", "train_accuracy", "gap", "nll"],
            against="none",
            compared=["accuracy", "nll"],
        ),
        Table(
            ["accuracy", "train_accuracy", "nll"],
            [
                *_differences("variational", "naive"),
                *_differences("dropconnect", "naive"),
                *_differences("zoneout", "naive"),
                *_differences("gaussian", "naive"),
            ],
        ),
    ],
    panels=[
        Panel("Accuracy after the last epoch", ["train_accuracy", "accuracy"]),
        Panel("NLL after the last epoch", "nll"),
        Panel(
            "Test accuracy during training, rate .3",
            "accuracies",
            rows=["none", *(f"{name} 0.3" for name in METHODS)],
            x_title="epoch",
        ),
        Panel(
            "NLL during training, rate .3",
            "nlls",
            rows=["none", *(f"{name} 0.3" for name in METHODS)],
            x_title="epoch",
        ),
    ],
    answer=(
        "At .3 zoneout alone keeps the accuracy ({accuracy[zoneout 0.3 - none]} points; naive "
        "masks, new at every step, {accuracy[naive 0.3 - none]}) and lowers the NLL "
        "({nll[zoneout 0.3 - none]}), though it drops in the state alone; at .1 the methods "
        "hardly differ, but for DropConnect ({accuracy[dropconnect 0.1 - none]}). Masks that "
        "all steps share are not better than new ones here (.1: {accuracy[variational 0.1 - "
        "naive 0.1]} points, .3: {accuracy[variational 0.3 - naive 0.3]}, no difference that 3 "
        "seeds can show), no method shows a gain in accuracy over none, and .3 of variational "
        "dropout or DropConnect is too much for so small a network and so few epochs "
        "({accuracy[variational 0.3 - none]} and {accuracy[dropconnect 0.3 - none]})."
    ),
    answered="71fefacf0ea8",
)

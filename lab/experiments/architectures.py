"""In which networks, and where in them, does dropout help?"""

from collections.abc import Mapping
from typing import Any

from dropserve.lab.experiment import Experiment, Panel, Setting, Table
from dropserve.lab.measures import trained

NETWORKS: Mapping[str, tuple[dict[str, Any], int]] = {
    "cnn": ({"kind": "cnn", "channels": (16, 32), "hidden": (64,), "dropout": (0.0,)}, 10),
    "pooled": (
        {"kind": "wrn", "channels": (8, 16, 32), "blocks": 1, "hidden": (), "dropout": (0.0,)},
        10,
    ),
    "connected": (
        {"kind": "wrn", "channels": (8, 16, 32), "blocks": 1, "hidden": (64,), "dropout": (0.0,)},
        10,
    ),
    "ViT": (
        {"kind": "vit", "hidden": (48,), "blocks": 2, "dropout": (0.0,), "stochastic_depth": 0.0},
        12,
    ),
}
"""Each with its epochs."""
PLACES: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "cnn": {
        "none": {},
        "head": {"dropout": (0.5,)},
        "spatial": {"spatial_dropout": 0.2},
        "input": {"input_dropout": 0.2},
        "head and spatial": {"dropout": (0.5,), "spatial_dropout": 0.2},
        "all": {"dropout": (0.5,), "spatial_dropout": 0.2, "input_dropout": 0.2},
    },
    "pooled": {
        "none": {},
        "between": {"dropout": (0.2,)},
        "spatial": {"regularizer": "spatial", "dropout": (0.2,)},
    },
    "connected": {
        "none": {},
        "between": {"dropout": (0.2, 0.0)},
        "head": {"dropout": (0.0, 0.5)},
    },
    "ViT": {
        "none": {},
        "dropout": {"dropout": (0.1,)},
        "depth": {"stochastic_depth": 0.2},
        "dropout and depth": {"dropout": (0.1,), "stochastic_depth": 0.2},
    },
}


def _settings() -> list[Setting]:
    found = []
    for kind, places in PLACES.items():
        network, epochs = NETWORKS[kind]
        for place, noise in places.items():
            values = {"network": kind, "place": place}
            label = f"{kind} {place}"
            found.append(Setting(label, {**network, **noise}, {"epochs": epochs}, values))
    return found


DIFFERENCES = [
    f"{kind} {place} - {kind} none"
    for kind, places in PLACES.items()
    for place in places
    if place != "none"
]
SHOWN = {difference.partition(" - ")[0]: difference for difference in DIFFERENCES}
INTERACTIONS = {
    "cnn: both - head - spatial": "cnn head and spatial - cnn head - cnn spatial + cnn none",
    "ViT: both - dropout - depth": "ViT dropout and depth - ViT dropout - ViT depth + ViT none",
    "between: pooled - connected": (
        "pooled between - pooled none - connected between + connected none"
    ),
}

EXPERIMENT = Experiment(
    question="Where in a CNN, a residual network or a transformer does dropout help or hurt?",
    setup=(
        (
            "A CNN of 16 and 32 channels and 64 fully connected units: rate .5 in the head, .2 of "
            "whole channels between its blocks (spatial), .2 on the input. A residual network of "
            "8, 16 and 32 channels, a block each, rate .2 between the two convolutions of a block, "
            "of single elements or of whole channels (spatial); it ends with global average "
            "pooling (pooled), or with 64 fully connected units in its place (connected), rate .5 "
            "in that head. A vision transformer of 2 blocks of width 48: dropout .1, stochastic "
            "depth up to .2."
        ),
        "6,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test images.",
        (
            "AdamW for 10 epochs, the transformer 12, with batches of 64, learning rate .003 with "
            "a half cosine."
        ),
    ),
    settings=_settings(),
    measure=trained,
    recipe={"batch_size": 64, "learning_rate": 3e-3},
    images=6_000,
    seeds=3,
    tables=[
        Table(["accuracy", "train_accuracy", "gap", "nll"]),
        Table(["accuracy", "train_accuracy", "gap", "nll"], DIFFERENCES),
        Table(["accuracy", "nll"], INTERACTIONS),
    ],
    panels=[
        Panel("Difference to no dropout", "accuracy", rows=SHOWN),
        Panel("Difference to no dropout", "nll", rows=SHOWN),
        Panel(
            "The CNN during training",
            ["train_accuracies", "accuracies"],
            rows=["cnn none", "cnn head", "cnn all"],
            x_title="epoch",
        ),
        Panel(
            "Global average pooling",
            ["train_accuracies", "accuracies"],
            rows=["pooled none", "pooled between", "pooled spatial"],
            x_title="epoch",
        ),
    ],
    answer=(
        "It helps in the residual network with a fully connected head, in that head "
        "({accuracy[connected head - connected none]} points, NLL {nll[connected head - "
        "connected none]}), and it hurts on the input of the CNN ({accuracy[cnn input - cnn "
        "none]}), in the network with global average pooling (between convolutions "
        "{accuracy[pooled between - pooled none]}, of whole channels {accuracy[pooled spatial - "
        "pooled none]}) and in the ViT ({accuracy[ViT dropout - ViT none]}). In the CNN's head "
        "3 seeds show no difference ({accuracy[cnn head - cnn none]}), dropping its channels "
        "changes accuracy by {accuracy[cnn spatial - cnn none]}; where it hurts, training "
        "accuracy is far lower, too (pooled, channels: {train_accuracy[pooled spatial - pooled "
        "none]}), so networks as small as these underfit in 10 to 12 epochs, and wider or "
        "longer trained ones may differ."
    ),
    answered="71515925ef86",
)

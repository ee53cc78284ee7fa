"""How much data? Srivastava et al., "Dropout" (JMLR 2014), figure 10."""

import torch

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.measures import scores
from dropserve.lab.run import QUICK_IMAGES, Run

IMAGES = (100, 300, 1000, 3000, 10_000, 30_000, 60_000)
EPOCHS, AN_EPOCH = 20, 30_000
"""For sets of up to so many images, which are repeated to that number: all have as many steps."""
NETWORKS = {"no dropout": (0.0,), "dropout": (0.2, 0.5)}


def measure(run: Run) -> Figures:
    """Train on images that are repeated to make an epoch, where there are few."""
    images = run.train_images
    wanted = max(len(images), QUICK_IMAGES if run.quick else AN_EPOCH)
    run.train(data=images.take(torch.arange(wanted) % len(images)))
    figures = scores(run)
    del figures["kept_accuracy"]  # the one image held out may be among those trained on
    return figures | {"error": 1 - figures["accuracy"]}


def _settings() -> list[Setting]:
    found = []
    for images in IMAGES:
        recipe = {"epochs": EPOCHS * AN_EPOCH // max(images, AN_EPOCH)}
        for name, dropout in NETWORKS.items():
            values = {"images": images, "network": name}
            label = f"{name}, {images:,} images"
            found.append(Setting(label, {"dropout": dropout}, recipe, values))
    return found


DIFFERENCES = {
    f"{size}: dropout - none": f"dropout, {size} - no dropout, {size}"
    for size in (f"{images:,} images" for images in IMAGES)
}

EXPERIMENT = Experiment(
    question="How much training data does dropout need, and does it still help with much of it?",
    setup=(
        "An MLP of two hidden layers of 128 units, without dropout and with rates .2 and .5.",
        (
            "100 to 60,000 images of Fashion-MNIST, the smaller sets of a seed within the larger "
            "ones, none held out but one; all 10,000 test images."
        ),
        (
            "AdamW, learning rate .001 with a half cosine, the same number of steps for all: 20 "
            "epochs of 30,000 images, to which fewer are repeated, or 10 of 60,000."
        ),
    ),
    settings=_settings(),
    measure=measure,
    measures={"error": Measure("test error, %", 2, percent=True)},
    recipe={"validation_share": 1e-6},
    tables=[
        Table(["error", "train_accuracy", "gap", "nll"]),
        Table(["error", "gap", "nll"], DIFFERENCES),
    ],
    panels=[
        Panel("Test error", "error", "images", "network", x_title="training images", log="xy"),
        Panel("Test error: dropout - none", "error",
              rows={shown.partition(":")[0]: each for shown, each in DIFFERENCES.items()}),
        Panel("Gap", "gap", "images", "network", x_title="training images", log="x"),
        Panel("NLL", "nll", "images", "network", x_title="training images", log="x"),
    ],
    answer=(
        "It helps with little data and hurts with much: the test error changes by "
        "{error[dropout, 100 images - no dropout, 100 images]} points at 100 images, "
        "{error[dropout, 3,000 images - no dropout, 3,000 images]} at 3,000 and {error[dropout, "
        "10,000 images - no dropout, 10,000 images]} at 10,000, but by {error[dropout, 30,000 "
        "images - no dropout, 30,000 images]} at 30,000 and {error[dropout, 60,000 images - no "
        "dropout, 60,000 images]} at 60,000, where training accuracy is lower, too "
        "({train_accuracy[dropout, 60,000 images - no dropout, 60,000 images]}). The NLL tells "
        "another story: with up to 1,000 images, which are seen hundreds of times and more, "
        "dropout raises it ({nll[dropout, 100 images - no dropout, 100 images]} nats at 100), "
        "and it lowers it most at 10,000 ({nll[dropout, 10,000 images - no dropout, 10,000 "
        "images]})."
    ),
    answered="5fcf9859da23",
)  # fmt: skip

"""Networks that were trained elsewhere, and versions that are trained further, by the commands."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from dropserve.models import checkpoint, recipes
from dropserve.models.training import fit, with_threads
from dropserve.service.inference.classifier import Classifier, Predict
from dropserve.service.inference.decoder import finish

NETS = """
from torch import nn
from .blocks import head
def Net(width=8):
    hidden = nn.Linear(3 * 6 * 9, width)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Dropout(0.3), head(width))
"""
CLASSES = ("red", "green", "blue")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a network in a file, its weights, and images of its classes."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "own.py").write_text(NETS)
    (tmp_path / "nets" / "blocks.py").write_text(
        "from torch import nn\ndef head(width):\n    return nn.Linear(width, 3)\n"
    )
    random = np.random.default_rng(0)
    for k, name in enumerate(CLASSES):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 60, (12, 30, 3), np.uint8)
            pixels[..., k] += 150
            Image.fromarray(pixels).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def imported(run, *options):
    """Import the network with weights that sort the images by their brightest channel."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(162, 8), torch.nn.ReLU(),
                              torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))  # fmt: skip
    with torch.no_grad():
        net[1].weight.zero_()
        for k in range(3):
            net[1].weight[k, 54 * k : 54 * (k + 1)] = 0.1
        net[4].weight.copy_(torch.eye(3, 8))
        for parameter in (net[1].bias, net[4].bias):
            parameter.zero_()
    safetensors.torch.save_file(net.state_dict(), "w.safetensors")
    given = {
        "--network": "nets/own.py:Net", "--weights": "w.safetensors", "--name": "mine",
        "--classes": ",".join(CLASSES), "--mean": "0.2", "--std": "0.5,0.25,0.5",
        "--channels": "3", "--size": "6x9", "--fit": "crop",
    }  # fmt: skip
    given |= dict(zip(options[::2], options[1::2], strict=True))
    return run("import", *[word for pair in given.items() for word in pair])


def test_an_imported_network_is_a_version_that_is_scored_and_served(run, here):
    result = imported(run, "--evaluate", "photos")
    assert result.exit_code == 0, result.output
    assert "24 test images" in result.stdout
    assert "next: DROPSERVE_FACTORIES=nets/own.py:Net dropserve serve" in result.stdout
    path = here / "checkpoints" / "mine" / "1"
    served = Classifier("mine", 1, path, ["elsewhere/own.py:Net", "nets/own.py:Net"])
    about = served.details()
    assert about["evaluation"]["eval"]["accuracy"] == 1.0
    assert about["input"] == {
        "height": 6, "width": 9, "channels": 3, "mean": [0.2] * 3, "std": [0.5, 0.25, 0.5],
        "invert": False, "fit": "crop",
    }  # fmt: skip
    wide = np.zeros((60, 200, 3), np.uint8)
    wide[..., 0] = 255
    wide[:, 45:155] = (0, 0, 255)  # what a crop of 3:2 leaves of it, and a little more
    pixels = served.preprocessing.prepare(Image.fromarray(wide))
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.full((6, 9, 3), (0, 0, 255)))
    (answer,) = finish(served.run(Predict(), [pixels[None]]))
    assert answer["predictions"][0]["label"] == "blue"
    assert json.loads((path / "model.json").read_text())["recipe"] == {"imported": "w.safetensors"}


@pytest.mark.usefixtures("here")
def test_images_are_scored_by_the_names_of_their_classes(run):
    turned = ("blue", "red", "green")
    assert imported(run, "--classes", ",".join(turned), "--evaluate", "photos").exit_code == 0
    Path("classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    assert imported(run, "--classes", "classes.txt", "--evaluate", "photos").exit_code == 0
    for version, accuracy in (("1", 0.0), ("2", 1.0)):
        how = ["--version", version, "--dataset", "photos", "--samples", 0, "--json", "--confusion"]
        result = run("evaluate", "--name", "mine", *how, DROPSERVE_FACTORIES="nets/own.py:Net")
        figures = json.loads(result.stdout)
        assert figures["eval"]["accuracy"] == accuracy
        names = figures["classes"]
        taken = {names[i]: names[row.index(8)] for i, row in enumerate(figures["confusion"])}
        renamed = dict(zip(CLASSES, turned if version == "1" else CLASSES, strict=True))
        assert taken == renamed
    shown = run("evaluate", "--name", "mine", *how[:4], "--confusion", "--samples", 0,
                DROPSERVE_FACTORIES="nets/own.py:Net")  # fmt: skip
    assert re.search(r"1 green +· +8 +·", shown.stdout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--network-arguments", '{"width": 5}'],
            "tensor '1.weight' is torch.float32 [8, 162], the network needs",
        ),
        (["--network", "nets/other.py:Net"], "nets/other.py:Net: FileNotFoundError"),
        (["--network", "torch.nn:Flatten"], "calls no dropout"),
        (["--weights", "none.safetensors"], "none.safetensors: cannot be opened: No such file"),
        (["--classes", "red"], "--classes: must be names with commas between them, or a file"),
        (["--classes", "red,green"], "makes 3 logits for 2 classes"),
        (["--classes", "red,green,red"], "class names must be distinct and not empty"),
        (["--mean", "0.1,0.2"], "mean and std need one value a channel"),
        (["--mean", "a"], "--mean: must be numbers"),
        (["--mean", "123"], "to 255 by 255"),
        (["--std", "58,57,57"], "to 255 by 255"),
        (["--size", "6 x 9 x 3"], "--size: must be pixels of a side, or height x width, as 48x64"),
        (["--size", "8"], "cannot take images of (3, 8, 8)"),
        (["--name", "a/b"], "'a/b' cannot name a model"),
        (["--evaluate", "digits"], "digits has images (1, 8, 8)"),
        (["--evaluate", "nets"], "needs at least two sub-folders"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line_and_saves_nothing(
    run, here, options, message
):
    result = imported(run, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (here / "checkpoints").exists()


def train(run, *options):
    return run("train", "--dataset", "photos", "--epochs", 3, "--batch-size", 4, "--samples", 0,
               *options, DROPSERVE_FACTORIES="nets/own.py:Net")  # fmt: skip


def test_a_version_that_is_trained_further_says_what_it_came_from_and_resumes_to_the_bit(run, here):
    assert imported(run, "--classes", "green,red,blue").exit_code == 0
    result = train(run, "--from", "mine")
    assert result.exit_code == 0, result.output
    load = {n: checkpoint.load(here / f"checkpoints/mine/{n}", None) for n in (1, 2)}
    before, after = load[1][1], load[2][1]
    assert after.recipe["from"] == {"name": "mine", "version": 1, "sha256": before.sha256}
    assert after.recipe["learning_rate"] == pytest.approx(2e-4)
    for same in ("network", "preprocessing", "classes"):
        assert getattr(after, same) == getattr(before, same)

    plan = recipes.plan_from(
        here / "checkpoints/mine/1", None, "photos", here, recipe={"epochs": 3, "batch_size": 4}
    )
    normalize, images = plan.data.preprocessing.normalize, plan.data.train
    recipe = with_threads(plan.recipe, plan.module, normalize(images.images[:1]))
    state = here / "checkpoints/again/.training/state.safetensors"
    made_with = plan.description() | {"on": ["32-true", 1]}
    epochs = fit(plan.module, images, normalize, recipe, state_path=state, description=made_with)
    next(epochs)
    epochs.close()
    result = train(run, "--from", "mine/2", "--name", "again", "--resume")
    assert (result.exit_code, "another version to start from" in result.stderr) == (2, True)
    assert train(run, "--from", "mine/1", "--name", "again", "--resume").exit_code == 0
    _, resumed = checkpoint.load(here / "checkpoints/again/1", None)
    assert resumed.sha256 == after.sha256 != before.sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "mine", "--dataset", "digits"], "digits has images (1, 8, 8)"),
        (["--from", "mine", "--dataset", "fewer"], "it lacks blue and has yellow too"),
        (["--from", "mine", "--hidden", "3", "--invert"], "not --hidden, --invert"),
        (["--from", "mine", "--fit", "stretch"], "not --fit"),
        (["--from", "mine/7"], "no version 7 of 'mine' in checkpoints: there are 1"),
        (["--from", "min"], "no model 'min' in checkpoints: there are mine; did you mean mine?"),
        (["--from", "mine/latest"], "--from: must be NAME or NAME/VERSION"),
    ],
)
def test_what_cannot_be_trained_further_is_refused(run, here, options, message):
    imported(run)
    for name in ("red", "green", "yellow"):
        (here / "fewer" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (9, 6)).save(here / "fewer" / name / f"{i}.png")
    result = train(run, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert [path.name for path in (here / "checkpoints").iterdir()] == ["mine"]


@pytest.mark.usefixtures("here")
def test_a_checkpoint_of_a_file_is_not_loaded_where_it_is_not_trusted(run):
    imported(run)
    for allowed in ("", "nets/blocks.py:Net", "a/own.py:Net,b/own.py:Net"):
        result = run(
            "evaluate", "--name", "mine", "--dataset", "photos", DROPSERVE_FACTORIES=allowed
        )
        assert result.exit_code == 2
        assert "not trusted" in result.stderr or "a/own.py:Net or b/own.py:Net" in result.stderr


def test_broken_images_are_listed_one_a_line_or_skipped(run, here):
    for name in ("red/a.jpg", "blue/b.png"):
        (here / "photos" / name).write_bytes(b"broken")
    result = run("train", "--dataset", "photos", "--network", "cnn", "--name", "x", "--epochs", 1)
    assert result.exit_code == 2
    assert result.stderr == (
        "error: photos: 2 of 26 images cannot be read; give --skip-broken to go on without them\n"
        "photos/blue/b.png: not a PNG, JPEG or WebP image\n"
        "photos/red/a.jpg: not a PNG, JPEG or WebP image\n"
    )
    result = train(run, "--network", "cnn", "--name", "x", "--skip-broken", "--size", "8")
    assert result.exit_code == 0, result.output
    assert "; 12x30 pixels, stretched to 8x8; broken images skipped: 2\n" in result.stdout

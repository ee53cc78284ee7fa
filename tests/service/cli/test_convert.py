"""`dropserve convert`: what it publishes and prints, and that a refusal writes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dropserve.models import checkpoint, examples
from dropserve.models.data import Split
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.service.errors import InvalidRequest
from dropserve.service.inference.classifier import Classifier, Predict, Uncertainty
from dropserve.service.inference.decoder import finish
from tests.helpers import dropserve, invoke

PREPROCESSING = Preprocessing((8, 8), 1, (0.3,), (0.4,))
NETWORK = NetworkConfig("mlp", (1, 8, 8), 3, (6, 5), (0.2, 0.5), regularizer="vanilla")
SCORES = {"accuracy": 0.9, "nll": 0.3, "brier": 0.2, "ece": 0.1}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), np.uint8)


@pytest.fixture
def root(tmp_path):
    """A folder with two versions of a model, with scores and examples."""
    test = Split(torch.from_numpy(PIXELS), torch.arange(6) % 3)
    about = checkpoint.Metadata(
        "m",
        NETWORK,
        PREPROCESSING,
        ("a", "b", "c"),
        recipe={"epochs": 3},
        data={"name": "digits"},
        evaluation={"images": 6, "eval": SCORES, "dropout": {**SCORES, "samples": 10, "seed": 0}},
        examples=examples.choose(test, 3, PREPROCESSING),
    )
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            checkpoint.save(tmp_path, NETWORK.build(), about)
    return tmp_path


def served(root, version):
    return Classifier("m", version, root / "m" / str(version))


def probabilities(root, version):
    (answer,) = finish(served(root, version).run(Predict(), [PIXELS]))
    return [each["probabilities"] for each in answer["predictions"]]


def test_a_converted_version_is_the_next_one_and_says_what_it_was_made_of(root):
    printed = dropserve(
        "convert", "m", "--version", 1, "--to", "inverted", "--dropout", ".1", "--checkpoints", root
    )
    for line in (
        "dropout: (0.2, 0.5), now (0.1, 0.1)",
        "regularizer: vanilla, now dropout",
        "weights of hidden2: multiplied by 0.8",
        f"saved {root}/m/3",
        f"to score it again: dropserve evaluate --name m --version 3 --checkpoints {root}",
    ):
        assert line in printed.splitlines()
    before, after = (checkpoint.read(root / "m" / n).metadata for n in "13")
    start = {"name": "m", "version": 1, "sha256": before.sha256}
    was = {"dropout": [0.2, 0.5], "regularizer": "vanilla"}
    scaled = {"hidden2": 0.8, "logits": 0.5}
    assert after == replace(
        before,
        network=replace(NETWORK, regularizer="dropout", dropout=(0.1, 0.1)),
        recipe={"epochs": 3, "converted": {"from": start, "was": was, "scaled": scaled}},
        evaluation={"images": 6, "eval": SCORES},
        sha256=after.sha256,
    )
    np.testing.assert_allclose(probabilities(root, 3), probabilities(root, 1), rtol=1e-5)
    finish(served(root, 3).run(Uncertainty(samples=10), [PIXELS]))


def test_a_network_whose_noise_is_removed_predicts_and_draws_no_samples(root):
    (root / "m").rename(root / "n")  # its new version belongs there, whatever the old one says
    assert f"saved {root}/n/3" in dropserve(
        "convert", "n", "--remove-dropout", "--checkpoints", root
    )
    (root / "n").rename(root / "m")
    np.testing.assert_allclose(probabilities(root, 3), probabilities(root, 2), rtol=1e-5)
    with pytest.raises(InvalidRequest, match="draws no noise") as refused:
        finish(served(root, 3).run(Uncertainty(samples=10), [PIXELS]))
    assert refused.value.status == 422


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["m"], "nothing to convert: give --dropout"),
        (["m", "--remove-dropout", "--input-dropout", 0.1], "rates or --remove-dropout, not both"),
        (["m", "--dropout", ".1,.2,.3"], "2 rates, not 3"),
        (["m", "--to", "vanilla"], "the version has this already"),
        (["m", "--version", 7, "--to", "inverted"], "no version 7 of 'm'"),
        (["other", "--to", "inverted"], "no model 'other'"),
    ],
)
def test_a_refusal_writes_nothing(root, options, reason):
    result = invoke("convert", *options, "--checkpoints", root)
    assert (result.exit_code, result.stdout) == (2, "")
    assert reason in result.stderr
    assert sorted(path.name for path in root.glob("*/*")) == ["1", "2"]

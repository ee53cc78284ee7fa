"""The main job on a real dataset: train by command line, serve on a socket, ask with the client.

Needs Fashion-MNIST, in the folder that DROPSERVE_DATA_DIR names or in `../shared/data`.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.data import load_dataset
from dropserve.models.dropout import InvertedDropout
from dropserve.service.client import DropserveClient
from tests.helpers import encode

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("DROPSERVE_DATA_DIR", ROOT.parent / "shared" / "data"))
IMAGES = 100
PASSES = 1000

pytestmark = pytest.mark.skipif(
    not (DATA / "fashion-mnist").is_dir(), reason="Fashion-MNIST is not in DROPSERVE_DATA_DIR"
)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A folder with a Fashion-MNIST MLP, trained for two epochs."""
    root = tmp_path_factory.mktemp("fashion")
    train = [Path(sys.executable).with_name("dropserve"), "train", "--dataset", "fashion-mnist"]
    train += ["--epochs", "2", "--samples", "10", "--checkpoints", root, "--data-dir", DATA]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
    return root


@pytest.fixture(scope="module")
def test_split():
    return load_dataset("fashion-mnist", DATA).test


def test_two_epochs_are_enough_for_85_percent(fashion):
    _, metadata = checkpoint.load(fashion / "fashion-mnist-mlp" / "1")
    assert metadata.evaluation["images"] == 10_000
    assert metadata.evaluation["eval"]["accuracy"] > 0.85


def test_served_monte_carlo_mean_is_that_of_a_plain_loop_in_train_mode(
    fashion, test_split, make_server
):
    images = test_split.images[:IMAGES]
    server = make_server(fashion, default_model=None, max_images=IMAGES).start()
    with DropserveClient(server.url, timeout=60) as client:
        answer = client.uncertainty([encode(i.squeeze(0).numpy()) for i in images], samples=PASSES)
    served = np.array([p.mean for p in answer.predictions])

    module, metadata = checkpoint.load(fashion / "fashion-mnist-mlp" / "1")
    for child in module.modules():
        if isinstance(child, InvertedDropout):
            child.train()
    x = metadata.preprocessing.normalize(images)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        loop = torch.stack([module(x).softmax(-1) for _ in range(PASSES)]).double().numpy()

    gap = served - loop.mean(0)
    loop_error = loop.std(0, ddof=1) / np.sqrt(PASSES)
    assert np.sqrt((gap**2).mean()) < 0.004
    assert np.abs(gap).mean(1).max() < 0.01  # the average class of the worst picture
    assert (np.abs(gap) < 5 * loop_error + 1e-4).all()  # both are noisy; ours the less
    print(f"max {np.abs(gap).max():.4f}, RMSE {np.sqrt((gap**2).mean()):.4f}")

"""The network that all serve, the pictures they are asked about, and what they must answer.

Computed from the checkpoint's weights in NumPy, in double precision, by none of the servers' code.
"""

import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from models import catalogue, checkpoint
from models.data import Split, load_dataset
from models.errors import DataError
from models.hyperparameters import Recipe
from models.networks import NetworkConfig
from models.preprocessing import Preprocessing
from models.training import fit

Array = NDArray[np.float64]

NAME, STAND_IN = "fashion-mnist-mlp", "digits-28x28-mlp"
OWN = Path(__file__).parent.parent / "checkpoints"
SIDE, PICTURES, PASSES = 28, 8, 20_000


def find_or_train(given: Path | None, data_dir: Path) -> Path:
    """Return the folder of a version: of `given`, or trained here, once, for two epochs.

    Where Fashion-MNIST is neither there nor to be had, digits of its size stand in for it: the
    network is the same, and so is the work.
    """
    root = given or OWN
    for name in (NAME, STAND_IN):
        if versions := catalogue.versions(root, name):
            return root / name / str(versions[-1])
    if given:
        raise SystemExit(f"there is no {NAME} in {given}")
    command = [str(Path(sys.executable).parent / "dropserve"), "train", "--dataset"]
    command += ["fashion-mnist", "--network", "mlp", "--epochs", "2", "--restart"]
    command += ["--checkpoints", str(root), "--data-dir", str(data_dir)]
    if subprocess.run(command, check=False).returncode == 0:
        return root / NAME / "1"
    return _train_stand_in(root)


def pictures(data_dir: Path) -> list[bytes]:
    """Return a few of Fashion-MNIST's test pictures, or of their stand-ins, as PNG."""
    try:
        images = load_dataset("fashion-mnist", data_dir).test.images
    except DataError:
        images = _stand_ins().images
    files = []
    for pixels in images[:PICTURES, 0].numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


def alone(version: Path, root: Path) -> Path:
    """Copy a version to `root`, so that nothing else is served from there."""
    return Path(shutil.copytree(version, root / version.parent.name / "1"))


def _stand_ins() -> Split:
    """Scikit-learn's digits, enlarged."""
    data = load_dataset("digits", Path()).train
    images = torch.nn.functional.interpolate(data.images.float(), (SIDE, SIDE), mode="bilinear")
    return Split(images.byte(), data.labels)


def _train_stand_in(root: Path) -> Path:
    data = _stand_ins()
    config, shown = NetworkConfig("mlp", (1, SIDE, SIDE), 10), Preprocessing.measured(data.images)
    module = config.build()
    list(fit(module, data, shown.normalize, Recipe(epochs=2)))
    classes = tuple("0123456789")
    return checkpoint.save(root, module, checkpoint.Metadata(STAND_IN, config, shown, classes))


@dataclass(frozen=True)
class Expected:
    """What a picture's answer must be.

    Attributes:
        probabilities: in eval mode [C].
        mean: over many thinned networks [C].
        deviation: of one thinned network from the mean [C].
        samples: T, of how many a server answers.
        variance: the least and the most, summed over the classes, that T of them had in many draws.
    """

    probabilities: Array
    mean: Array
    deviation: Array
    samples: int
    variance: tuple[float, float]

    def check_prediction(self, got: list[float]) -> None:
        """Compare a server's probabilities.

        Raises:
            WrongAnswer: they are further off than rounding can explain.
        """
        _require(got, self.probabilities, np.full(len(got), 1e-4))

    def check_samples(self, mean: list[float], variance: list[float]) -> None:
        """Compare a server's mean and variance over T thinned networks.

        Raises:
            WrongAnswer: they are further off than chance can explain.
        """
        _require(mean, self.mean, 6 * self.deviation / self.samples**0.5 + 2e-3)
        (least, most), got = self.variance, sum(variance)
        # of a picture that the network is sure of, T samples hold a rare one that adds a hundredth,
        # or none; of any other they never all agree
        if not least / 4 - 1e-4 <= got <= 2 * most + 0.03:
            raise WrongAnswer(f"variance {got:.2g}, expected {least:.2g} to {most:.2g}")


def _require(got: list[float], expected: Array, tolerance: Array) -> None:
    off = np.abs(np.asarray(got) - expected)
    if off.shape != expected.shape or not np.all(off <= tolerance):  # NaN is wrong too
        raise WrongAnswer(f"answered {np.round(got, 4)}, expected {np.round(expected, 4)}")


class WrongAnswer(Exception):
    """A server's answer is not the network's."""


def expected(version: Path, png: bytes, samples: int) -> Expected:
    """Compute a picture's answers from the weights, those under dropout for T = `samples`."""
    metadata = checkpoint.load(version)[1]
    weights = {
        name: t.astype(np.float64) for name, t in load_file(version / "model.safetensors").items()
    }
    shown = metadata.preprocessing
    pixels = np.asarray(Image.open(io.BytesIO(png)), np.float64).reshape(1, -1) / 255
    x = (pixels - shown.mean[0]) / shown.std[0]
    rng = np.random.default_rng(0)

    def run(rows: int, *, drop: bool) -> Array:
        h = x
        for i, p in enumerate(metadata.network.dropout, 1):
            h = np.maximum(h @ weights[f"hidden{i}.weight"].T + weights[f"hidden{i}.bias"], 0)
            if drop:
                h = h * (rng.random((rows, h.shape[1])) >= p) / (1 - p)
        logits = h @ weights["logits.weight"].T + weights["logits.bias"]
        e = np.exp(logits - logits.max(1, keepdims=True))
        result: Array = e / e.sum(1, keepdims=True)
        return result

    sampled = run(PASSES // samples * samples, drop=True)
    draws = sampled.reshape(-1, samples, sampled.shape[1]).var(1, ddof=1).sum(1)
    variance = (float(draws.min()), float(draws.max()))
    return Expected(run(1, drop=False)[0], sampled.mean(0), sampled.std(0), samples, variance)


def default_data_dir() -> Path:
    """Return where the project keeps its datasets."""
    return Path(os.environ.get("DROPSERVE_DATA_DIR", "data"))

"""The network that all serve, the pictures they are asked about, and what they must answer.

Computed from the checkpoint's weights in NumPy, in double precision, by none of the servers' code.
"""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from dropserve.models import checkpoint
from dropserve.models.data import Split, load_dataset
from dropserve.models.errors import DataError
from dropserve.models.hyperparameters import Recipe
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.models.training import fit

Array = NDArray[np.float64]

NAME, STAND_IN = "fashion-mnist-mlp", "digits-28x28-mlp"
OWN = Path(__file__).parent.parent / "checkpoints"
SIDE, PICTURES = 28, 8
CANDIDATES, ASKED = 1_000, 40
PASSES = 5_000


def find_or_train(given: Path | None, data_dir: Path) -> Path:
    """Return the folder of a version: of `given`, or trained here, once, for two epochs.

    Where Fashion-MNIST is neither there nor to be had, digits of its size stand in for it: the
    network is the same, and so is the work.
    """
    root = given or OWN
    for name in (NAME, STAND_IN):
        if versions := checkpoint.versions(root, name):
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
    """Return Fashion-MNIST's first test pictures, or their stand-ins, as PNG."""
    try:
        images = load_dataset("fashion-mnist", data_dir).test.images
    except DataError:
        images = _stand_ins().images
    files = []
    for pixels in images[:CANDIDATES, 0].numpy():
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
    config = NetworkConfig("mlp", (1, SIDE, SIDE), 10)
    shown = Preprocessing.measured([data.images])
    module = config.build()
    list(fit(module, data, shown.normalize, Recipe(epochs=2)))
    classes = tuple("0123456789")
    return checkpoint.save(root, module, checkpoint.Metadata(STAND_IN, config, shown, classes))


_LOG_ODDS = float(np.log(5 * 3 * 3 * 1e4))
"""Of checks of a right server to one in which it is called wrong: of the three bounds, for five
servers in three rounds, in 10,000 runs of the benchmark, one is missed."""


@dataclass(frozen=True)
class Expected:
    """What the answers about K pictures must be.

    Attributes:
        probabilities: in eval mode [K, C].
        mean: over many thinned networks [K, C].
        variance: of one thinned network about the mean, summed over the classes [K].
        samples: T, of how many thinned networks a server answers.
        spread: variances of the two sums that `check_samples` compares with 1.
    """

    probabilities: Array
    mean: Array
    variance: Array
    samples: int
    spread: tuple[float, float]

    def check_predictions(self, got: Array) -> None:
        """Compare a server's probabilities [K, C].

        Raises:
            WrongAnswer: they are further off than rounding can explain.
        """
        if got.shape != self.mean.shape or not np.all(np.abs(got - self.probabilities) <= 1e-4):
            off = f"{np.round(got, 4)}, expected {np.round(self.probabilities, 4)}"
            raise WrongAnswer(f"answered {off}")

    def check_samples(self, mean: Array, variance: Array) -> None:
        """Compare a server's mean [K, C] and variance [K, C] over T thinned networks.

        Both comparisons are sums over pictures and classes. The squared distance of T independent
        networks' mean from the reference's is variance / T + variance / PASSES on average (less if
        masks are stratified), and their variance is the reference's.

        Raises:
            WrongAnswer: they are further off than chance can explain.
        """
        if not mean.shape == variance.shape == self.mean.shape:
            raise WrongAnswer(f"answered {mean.shape} and {variance.shape} numbers")
        total = self.variance.sum()
        distance = np.square(mean - self.mean).sum() / (total / self.samples + total / PASSES)
        ratio = variance.sum() / total
        _, most = _bounds(self.spread[0])
        least, largest = _bounds(self.spread[1])
        if not (distance <= most and least <= ratio <= largest):  # NaN is wrong too
            raise WrongAnswer(
                f"squared distance {distance:.3g} times what is expected, at most {most:.3g}; "
                f"variance {ratio:.3g} times, {least:.3g} to {largest:.3g}"
            )


def _bounds(spread: float) -> tuple[float, float]:
    """Return what a sum with mean 1 and variance `spread` is next to never below or above.

    Of a sub-gamma variable (Boucheron, Lugosi and Massart, Concentration Inequalities, 2013,
    section 2.4) with the scale of the gamma variable that has this mean and variance.
    """
    width = (2 * spread * _LOG_ODDS) ** 0.5
    return 1 - width, 1 + width + spread * _LOG_ODDS


class WrongAnswer(Exception):
    """A server's answer is not the network's."""


def expected(version: Path, files: Sequence[bytes], samples: int) -> Expected:
    """Compute answers from the weights, those under dropout for T = `samples`."""
    network = _Network(version)
    x = network.read(files)
    drawn = np.stack([network.run(x, drop=True) for _ in range(PASSES)])  # shared masks: [N, K, C]
    variance = drawn.var(0, ddof=1).sum(1)
    blocks = drawn[: PASSES // samples * samples].reshape(-1, samples, *drawn.shape[1:])
    distances = samples * np.square(blocks.mean(1) - drawn.mean(0)).sum(2)  # [blocks, K]
    variances = blocks.var(1, ddof=1).sum(2)
    total = variance.sum()
    # a server draws other masks for each picture, or, with one seed, the same; then the pictures'
    # variances err together, while the distances are much smaller, because masks are stratified
    spread = distances.var(0, ddof=1).sum() / total**2, variances.sum(1).var(ddof=1) / total**2
    return Expected(network.run(x, drop=False), drawn.mean(0), variance, samples, spread)


def unsure(version: Path, files: Sequence[bytes]) -> list[bytes]:
    """Return the pictures about which thinned networks differ most.

    Of one that the network is sure of, T samples hold a rare odd one or they do not: that tells a
    right server from a wrong one only by luck.
    """
    network = _Network(version)
    x = network.read(files)
    variance = np.stack([network.run(x, drop=True) for _ in range(20)]).var(0).sum(1)
    return [files[k] for k in np.argsort(-variance)[:ASKED]]


class _Network:
    """A checkpoint's network in NumPy; masks are shared by all pictures of a pass."""

    def __init__(self, version: Path) -> None:
        self._metadata = checkpoint.load(version)[1]
        tensors = load_file(version / "model.safetensors").items()
        self._weights = {name: t.astype(np.float64) for name, t in tensors}
        self._rng = np.random.default_rng(0)

    def read(self, files: Sequence[bytes]) -> Array:
        """Decode and normalise pictures: [K, pixels]."""
        shown = self._metadata.preprocessing
        pixels = [np.asarray(Image.open(io.BytesIO(png)), np.float64).ravel() for png in files]
        normalised: Array = (np.stack(pixels) / 255 - shown.mean[0]) / shown.std[0]
        return normalised

    def run(self, h: Array, *, drop: bool) -> Array:
        """Return probabilities [K, C], of all units or of one thinned network."""
        for i, p in enumerate(self._metadata.network.dropout, 1):
            h = np.maximum(self._linear(f"hidden{i}", h), 0)
            if drop:
                h = h * (self._rng.random(h.shape[1]) >= p) / (1 - p)
        logits = self._linear("logits", h)
        e = np.exp(logits - logits.max(1, keepdims=True))
        result: Array = e / e.sum(1, keepdims=True)
        return result

    def _linear(self, name: str, h: Array) -> Array:
        result: Array = h @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return result


def default_data_dir() -> Path:
    """Return where the project keeps its datasets."""
    return Path(os.environ.get("DROPSERVE_DATA_DIR", "data"))

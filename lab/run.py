"""One run of an experiment: a setting, a seed, its data, and the training of networks."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dropserve.lab.experiment import Experiment, Figures, Setting
from dropserve.models import checkpoint, processes, training
from dropserve.models.data import Dataset, Split, load_dataset, read_idx
from dropserve.models.evaluation import evaluate
from dropserve.models.hyperparameters import Recipe

if TYPE_CHECKING:
    from dropserve.models.networks import NetworkConfig

QUICK_IMAGES, QUICK_EPOCHS = 500, 2
"""Of `--quick`, which shows that all works, and answers nothing."""

SEEN = 2000
"""Images, of those trained on, by which accuracy and NLL of training are measured."""

AtEpoch = Callable[[nn.Module, training.Epoch], Figures | None]


class Run:
    """A setting with a seed. The seed draws images, weights, order and masks.

    So runs of one seed are alike in all that the setting does not change: they are pairs.

    Attributes:
        curves: after `train`, lists with an element an epoch: figures of the weights after it.
    """

    def __init__(
        self, experiment: Experiment, setting: Setting, seed: int, data_dir: Path, *, quick: bool
    ) -> None:
        self.experiment, self.setting, self.seed, self.quick = experiment, setting, seed, quick
        self.curves: dict[str, list[Any]] = {}
        self._module: nn.Module | None = None
        self._data_dir = data_dir
        self._config: NetworkConfig | None = None
        self._recipe: Recipe | None = None

    @cached_property
    def data(self) -> Dataset:
        """Fashion-MNIST with as many training images as the experiment, or `images` says."""
        whole = fashion_mnist(self._data_dir)
        wanted = self.experiment.images_of(self.setting)
        test = whole.test
        if self.quick:
            wanted, test = min(wanted, QUICK_IMAGES), next(iter(test.batches(QUICK_IMAGES)))
        drawn = torch.randperm(len(whole.train), generator=self.generator())[:wanted]
        return replace(whole, train=whole.train.take(drawn), test=test)

    @property
    def train_images(self) -> Split:
        """The images that are trained on, those of validation too."""
        return self.data.train

    @property
    def test(self) -> Split:
        """The test images."""
        return self.data.test

    @property
    def module(self) -> nn.Module:
        """The network of `train` in eval mode, as it was after the last epoch.

        Not the best one: to choose an epoch is a regularizer of its own. ValueError: none is
        trained.
        """
        if self._module is None:
            raise ValueError("train a network first")
        return self._module

    def mnist(self) -> Tensor:
        """Return as many of MNIST's images, uint8 [N, 1, 28, 28], as there are test images."""
        return mnist(self._data_dir)[: len(self.test)]

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 [B, C, H, W] to a network's input."""
        return self.data.preprocessing.normalize(images)

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return a generator for what an experiment draws itself."""
        return torch.Generator().manual_seed(1_000_003 * offset + self.seed)

    def build(self, **network: Any) -> nn.Module:  # noqa: ANN401  fields of `NetworkConfig`
        """Make the setting's network with fresh weights, drawn by the seed."""
        self._config = self.experiment.network_of(self.setting, **network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._config.build()

    def recipe(self, **changes: Any) -> Recipe:  # noqa: ANN401  fields of `Recipe`
        """Return how the setting's network is trained."""
        found = self.experiment.recipe_of(self.setting, seed=self.seed, **changes)
        return replace(found, epochs=min(found.epochs, QUICK_EPOCHS)) if self.quick else found

    def train(
        self,
        at_epoch: AtEpoch | None = None,
        module: nn.Module | None = None,
        data: Split | None = None,
        **recipe: Any,  # noqa: ANN401  fields of `Recipe`
    ) -> nn.Module:
        """Train the setting's network, or `module`; return it as it is after the last epoch.

        `curves` gets test accuracy and NLL, training accuracy and NLL (all in eval mode), and
        whether the epoch was the best on the validation images; and what `at_epoch` returns.
        """
        module = self.build() if module is None else module
        data = self.train_images if data is None else data
        self._recipe = self.recipe(**recipe)
        last, self.curves = {}, {}
        seen = next(iter(training.divide(data, self._recipe)[0].batches(SEEN)))
        on_cpu = processes.launch("cpu")  # where the measures are taken, and rounding is the same
        for epoch in training.fit(module, data, self.normalize, self._recipe, fabric=on_cpu):
            figures = self._at_epoch(module, epoch, seen) | (
                (at_epoch(module, epoch) if at_epoch else None) or {}
            )
            module.eval()
            for name, value in figures.items():
                self.curves.setdefault(name, []).append(value)
            if epoch.number == self._recipe.epochs:
                last = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(last)
        self._module = module
        return module

    def _at_epoch(self, module: nn.Module, epoch: training.Epoch, seen: Split) -> Figures:
        accuracy, nll = training.validate(module, self.test, self.normalize)
        train_accuracy, train_nll = training.validate(module, seen, self.normalize)
        return {
            "accuracies": accuracy,
            "nlls": nll,
            "train_accuracies": train_accuracy,
            "train_nlls": train_nll,
            "best": epoch.best,
        }

    def publish(self, root: Path, name: str) -> None:
        """Save the network of `train` as the next version of a model, unless the last one is it."""
        if self._module is None or self._config is None or self._recipe is None:
            return
        if found := checkpoint.versions(root, name):
            saved, _ = checkpoint.load(root / name / str(found[-1]))
            tensors = self._module.state_dict()
            if all(torch.equal(tensors[k], t) for k, t in saved.state_dict().items()):
                return
        data, made = self.data, asdict(self._recipe)
        scores = evaluate(self._module, data.test, self.normalize, samples=0)
        about = checkpoint.Metadata(
            name, self._config, data.preprocessing, data.classes, made, data.origin(), scores
        )
        checkpoint.save(root, self._module, about)


@lru_cache(maxsize=1)
def fashion_mnist(data_dir: Path) -> Dataset:
    """Read Fashion-MNIST, or download it; DataError."""
    return load_dataset("fashion-mnist", data_dir)


def mnist(data_dir: Path) -> Tensor:
    """Read MNIST's test images, uint8 [10000, 1, 28, 28], or download them; DataError.

    A folder `mnist-10k` may have them alone, as images-idx3-ubyte.gz.
    """
    alone = data_dir / "mnist-10k" / "images-idx3-ubyte.gz"
    if alone.exists():
        return read_idx(alone).unsqueeze(1)
    return load_dataset("mnist", data_dir).test.images

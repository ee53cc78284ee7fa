"""From what somebody asks for to what is trained and scored, with what we suggest for the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.catalogue import is_name
from models.checkpoint import Metadata
from models.data import NAMED, Dataset, Split, load_dataset
from models.errors import ConfigError, DataError, ModelsError
from models.montecarlo import Sampler
from models.networks import NetworkConfig, default_config
from models.training import Recipe


def default_recipe(dataset: str, network: str) -> Recipe:
    """Suggest how to train.

    Args:
        dataset: as `models.data.load_dataset` takes it.
        network: as `models.networks.NetworkConfig.kind`.
    """
    if dataset == "digits":
        return Recipe(epochs=60, batch_size=32, learning_rate=1e-3)
    if (dataset, network) == ("fashion-mnist", "cnn"):
        return Recipe(epochs=14, learning_rate=3e-3, weight_decay=0.05, shift=1, flip=True)
    if (dataset, network) == ("fashion-mnist", "mlp"):
        return Recipe(epochs=30, learning_rate=1e-3)
    return Recipe()


@dataclass(frozen=True)
class Plan:
    """What is to be trained, checked before the work starts: fresh weights in `module`."""

    data: Dataset
    config: NetworkConfig
    recipe: Recipe
    module: nn.Module


def plan(
    dataset: str,
    network: str,
    data_dir: Path,
    *,
    recipe: Mapping[str, Any],
    size: int | None = None,
    invert: bool = False,
    hidden: tuple[int, ...] | None = None,
    dropout: tuple[float, ...] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Plan:
    """Suggest all that is not asked for, and see that it can be trained and sampled.

    Args:
        dataset: as `models.data.load_dataset` takes it, with `data_dir`, `size` and `invert`.
        network: "mlp", "cnn" or "package.module:factory".
        data_dir: of datasets.
        recipe: the fields of `Recipe` that are asked for.
        size: as `models.data.load_dataset` takes it.
        invert: likewise.
        hidden: widths of an mlp's or cnn's hidden layers.
        dropout: rates after them.
        arguments: of a factory.

    Raises:
        ConfigError, DataError, UnsupportedModule: it cannot.
    """
    chosen = replace(default_recipe(dataset, network), **recipe)
    data = load_dataset(dataset, data_dir, size=size, invert=invert)
    prepared = data.preprocessing
    if ":" in network and (hidden is not None or dropout is not None):
        raise ConfigError("hidden widths and dropout rates are for mlp and cnn: use arguments")
    if ":" not in network and arguments is not None:
        raise ConfigError(
            f"arguments are for a factory, package.module:factory, not for {network!r}"
        )
    asked = {"hidden": hidden, "dropout": dropout, "arguments": arguments}
    changes: dict[str, Any] = {field: value for field, value in asked.items() if value is not None}
    config = replace(default_config(network, prepared.shape, len(data.classes)), **changes)
    example = prepared.normalize(data.train.images[:1])
    return Plan(data, config, chosen, build_checked(config, example, chosen.seed))


def build_checked(config: NetworkConfig, example: Tensor, seed: int) -> nn.Module:
    """Make the module with fresh weights, and see that Monte Carlo dropout will run on it.

    Args:
        config: of the network.
        example: normalised images [B, C, H, W].
        seed: of the weights; PyTorch's global generator is left as it was.

    Raises:
        ConfigError: it cannot be built, or has another number of logits than there are classes.
        UnsupportedModule: it has no dropout, or one that no mask can reach.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = config.build()
    try:
        logits = Sampler(module.eval(), example).classes
    except ModelsError:
        raise
    except Exception as error:  # somebody's own module may fail in any way
        shape = tuple(example.shape[1:])
        raise ConfigError(f"{config.kind} cannot take images of {shape}: {error}") from error
    if logits != config.classes:
        raise ConfigError(f"{config.kind} makes {logits} logits for {config.classes} classes")
    return module


def check_run(name: str, accelerator: str) -> None:
    """Refuse before the training what would fail after it, or in another library.

    Raises:
        ConfigError: the name is none for a model, or there is no such accelerator.
    """
    if not is_name(name):
        raise ConfigError(f"{name!r} cannot name a model: use 1 to 64 of A-Z a-z 0-9 . _ -")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no accelerator cuda: PyTorch finds no CUDA device here")


def evaluation_images(metadata: Metadata, dataset: str | None, data_dir: Path) -> Split:
    """Load test images to score a saved model on, prepared as its own were.

    Args:
        metadata: of the model.
        dataset: as `models.data.load_dataset` takes it; None: what the model was trained on.
        data_dir: as `models.data.load_dataset` takes it.

    Raises:
        DataError: they are not there, or have another shape or other classes.
    """
    prepared = metadata.preprocessing
    name = dataset or metadata.data.get("name")
    if not name or (dataset is None and name not in NAMED):
        raise DataError(f"{metadata.name} was not trained on a named dataset: give --dataset")
    size = prepared.size[0] if Path(name).is_dir() else None
    data = load_dataset(name, data_dir, size=size, invert=prepared.invert)
    if (data.preprocessing.shape, data.classes) != (prepared.shape, metadata.classes):
        raise DataError(
            f"{name} has images {data.preprocessing.shape} of {', '.join(data.classes)}; "
            f"{metadata.name} takes {prepared.shape} of {', '.join(metadata.classes)}"
        )
    if dataset is None and data.digest() != metadata.data.get("digest"):
        raise DataError(f"{name} is not the data that {metadata.name} was trained on any more")
    return data.test

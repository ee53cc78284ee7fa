"""From what somebody asks for to what is trained and scored, with what we suggest for the rest."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.catalogue import is_name
from models.checkpoint import Metadata
from models.data import Split, load_dataset
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
        return Recipe(epochs=40, batch_size=64)
    if (dataset, network) == ("fashion-mnist", "cnn"):
        return Recipe(epochs=20, learning_rate=3e-3, weight_decay=0.05, shift=1, flip=True)
    return Recipe()


def network_config(
    kind: str,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    hidden: tuple[int, ...] | None = None,
    dropout: tuple[float, ...] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> NetworkConfig:
    """Describe the network we suggest of a kind, changed where something is asked for.

    Raises:
        ConfigError: a value makes no sense, or is not of this kind of network.
    """
    factory = ":" in kind
    if factory and (hidden is not None or dropout is not None):
        raise ConfigError("hidden widths and dropout rates are for mlp and cnn: use arguments")
    if not factory and arguments is not None:
        raise ConfigError(f"arguments are for a factory, package.module:factory, not for {kind!r}")
    asked = {"hidden": hidden, "dropout": dropout, "arguments": arguments}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    return replace(default_config(kind, input_shape, classes), **changes)


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


def test_split(metadata: Metadata, dataset: str | None, data_dir: Path) -> Split:
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
    if not name:
        raise DataError(f"the checkpoint of {metadata.name} names no dataset: give --dataset")
    size = prepared.size[0] if Path(name).is_dir() else None
    data = load_dataset(name, data_dir, size=size, invert=prepared.invert)
    if (data.preprocessing.shape, data.classes) != (prepared.shape, metadata.classes):
        raise DataError(
            f"{name} has images {data.preprocessing.shape} of {', '.join(data.classes)}; "
            f"{metadata.name} takes {prepared.shape} of {', '.join(metadata.classes)}"
        )
    return data.test

"""Checks and prepares what is to be trained, imported or scored.

What cannot be done raises ConfigError, DataError, CheckpointError or UnsupportedModule.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropserve.models import checkpoint
from dropserve.models.checkpoint import Metadata
from dropserve.models.data import NAMED, Dataset, Split, load_dataset
from dropserve.models.defaults import Device
from dropserve.models.device import find_device
from dropserve.models.errors import ConfigError, DataError, ModelsError
from dropserve.models.factories import FORMS
from dropserve.models.hyperparameters import Recipe, default_recipe
from dropserve.models.montecarlo import Sampler
from dropserve.models.networks import NETWORKS, NetworkConfig, default_config
from dropserve.models.preprocessing import Preprocessing


@dataclass(frozen=True)
class Plan:
    """What is to be trained, checked before the work starts."""

    data: Dataset
    config: NetworkConfig
    recipe: Recipe
    module: nn.Module  # with fresh weights, or those of the version that it starts from
    start: Mapping[str, Any]  # name, version and digest of that version; empty: there is none

    def description(self) -> dict[str, Any]:
        """Say what an interrupted run must have begun with to be continued by this plan."""
        return {"network": self.config.to_json(), "from": dict(self.start)}

    def metadata(self, name: str, recipe: Recipe) -> Metadata:
        """Describe the trained model."""
        made = asdict(recipe) | ({"from": dict(self.start)} if self.start else {})
        data = self.data
        return Metadata(name, self.config, data.preprocessing, data.classes, made, data.origin())


def plan(
    dataset: str,
    network: str,
    data_dir: Path,
    *,
    recipe: Mapping[str, Any],
    asked: Mapping[str, Any] | None = None,
    **how: Any,  # noqa: ANN401  what `load_dataset` takes
) -> Plan:
    """Fill in defaults, and check that the network can be trained and sampled.

    `recipe` has the fields of `Recipe` that are asked for; `asked` those of `NetworkConfig`, of a
    factory `arguments` alone.
    """
    data = load_dataset(dataset, data_dir, **how)
    chosen = replace(default_recipe(dataset, network, len(data.train)), **recipe)
    config = _config(network, data.preprocessing, len(data.classes), asked or {})
    example = data.preprocessing.normalize(data.train.take(torch.arange(1)).images)
    return Plan(data, config, chosen, build_checked(config, example, chosen.seed), {})


def plan_from(
    path: Path,
    factories: Collection[str] | None,
    dataset: str,
    data_dir: Path,
    *,
    recipe: Mapping[str, Any],
    **how: Any,  # noqa: ANN401  what `load_dataset` takes
) -> Plan:
    """Plan to train a saved version further: its network, weights, preprocessing and classes.

    The learning rate that is suggested is a tenth of that for fresh weights.
    """
    module, found = checkpoint.load(path, factories)
    data = _load_for(found, dataset, data_dir, **how)
    usual = default_recipe(dataset, found.network.kind, len(data.train))
    chosen = replace(replace(usual, learning_rate=usual.learning_rate / 10), **recipe)
    start = {"name": found.name, "version": int(path.name), "sha256": found.sha256}
    return Plan(data, found.network, chosen, module, start)


def imported(
    name: str,
    weights: Path,
    network: str,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    asked: Mapping[str, Any],
) -> tuple[nn.Module, Metadata]:
    """Make a model of a network trained elsewhere, with the checks of `plan`.

    `weights` is a safetensors file of all its tensors, `classes` are in the order of its logits.
    """
    if len(set(classes)) < len(classes) or not all(classes):
        raise ConfigError("class names must be distinct and not empty")
    if not all(0 <= m <= 1 for m in preprocessing.mean) or max(preprocessing.std) > 1:
        raise ConfigError("mean and std must be of pixels 0 to 1: divide those of 0 to 255 by 255")
    config = _config(network, preprocessing, len(classes), asked)
    blank = torch.zeros(1, *preprocessing.shape, dtype=torch.uint8)
    module = build_checked(config, preprocessing.normalize(blank), seed=0)
    checkpoint.load_weights(weights, module)
    metadata = Metadata(name, config, preprocessing, tuple(classes), {"imported": weights.name})
    return module.eval(), metadata


def evaluation_images(
    metadata: Metadata,
    dataset: str | None,
    data_dir: Path,
    **how: Any,  # noqa: ANN401  what `load_dataset` takes
) -> Split:
    """Load test images to score a saved model on, prepared as its own were.

    A `dataset` of None is the one that the model was trained on. A model that was not trained here
    is scored on the whole of a folder.
    """
    name = dataset or metadata.data.get("name")
    if not name or (dataset is None and name not in NAMED):
        raise DataError(f"{metadata.name} was not trained on a named dataset: give --dataset")
    data = _load_for(metadata, name, data_dir, whole=not metadata.data, **how)
    if dataset is None and data.digest() != metadata.data.get("digest"):
        raise DataError(f"{name} has changed since {metadata.name} was trained on it")
    return data.test


def check_run(name: str, device: Device = "auto") -> None:
    """Raise errors early that would otherwise come after the training."""
    if not checkpoint.is_name(name):
        raise ConfigError(f"{name!r} cannot name a model: {checkpoint.NAME_RULE}")
    find_device(device)


def build_checked(config: NetworkConfig, example: Tensor, seed: int) -> nn.Module:
    """Make the module with fresh weights, and check that it can be sampled.

    `example` is normalised images [B, C, H, W]. PyTorch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = config.build()
    try:
        module.eval()
        logits = Sampler(module, example).classes if config.is_noisy else module(example).shape[1]
    except ModelsError:
        raise
    except Exception as error:  # a user's module may fail with anything
        reason = f"cannot take images of {tuple(example.shape[1:])}: {error}"
        raise ConfigError(f"{config.kind} {reason}") from error
    if logits != config.classes:
        raise ConfigError(f"{config.kind} makes {logits} logits for {config.classes} classes")
    return module


def _load_for(metadata: Metadata, dataset: str, data_dir: Path, **how: Any) -> Dataset:  # noqa: ANN401
    """Load a dataset as a saved model takes it: prepared as its own was, classes in its order."""
    prepared, classes = metadata.preprocessing, metadata.classes
    return load_dataset(dataset, data_dir, preprocessing=prepared, classes=classes, **how)


def _config(
    network: str, preprocessing: Preprocessing, classes: int, asked: Mapping[str, Any]
) -> NetworkConfig:
    if ":" in network and (wrong := asked.keys() - {"arguments"}):
        options = ", ".join(sorted(wrong))
        raise ConfigError(f"{options}: for {', '.join(NETWORKS)}; for a factory use arguments")
    if ":" not in network and "arguments" in asked:
        raise ConfigError(f"arguments are for a factory, {FORMS}, not for {network!r}")
    usual = default_config(network, preprocessing.shape, classes, asked.get("regularizer"))
    return replace(usual, **asked)

"""Another version of a trained network: other rates, none, or vanilla dropout made inverted.

Eval mode has noise at its mean. For most methods that is 1, or 0 of added noise, at any rate, and
weights stay as they are. Vanilla dropout multiplies by 1-p instead, which can be moved into the
weights that next read the units (Srivastava et al., 2014, figure 2): between the two are at most
ReLU and reshaping, which commute with a positive factor.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from dropserve.models.checkpoint import Metadata, Version
from dropserve.models.errors import ConfigError
from dropserve.models.networks import NETWORKS, NetworkConfig

CONVENTIONS = {"vanilla": "vanilla", "inverted": "dropout"}
"""What `--to` names, and its regularizer."""
_IMAGES = 16
_TOLERANCE = 1e-5  # of the largest logit


def converted(
    version: Version, asked: Mapping[str, Any], *, remove: bool = False
) -> tuple[nn.Module, Metadata]:
    """Make a network with the logits of a saved one in eval mode, and describe it.

    `asked` has `dropout`, `input_dropout` and `regularizer` of `NetworkConfig`, as far as they are
    to change; one rate is for every layer. `remove` sets all rates to 0. Scores of Monte Carlo
    dropout are left out. ConfigError says what cannot be converted, and what can.
    """
    old, name = version.metadata.network, version.path.parent.name
    new = _changed(old, asked, remove=remove)
    before, after = _kept(old), _kept(new)
    ratios = {layer: before.get(layer, 1.0) / after.get(layer, 1.0) for layer in before | after}
    scaled = {layer: ratio for layer, ratio in ratios.items() if ratio != 1}
    tensors = dict(version.tensors)
    for layer, ratio in scaled.items():
        weight = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = (weight.double() * ratio).to(weight.dtype)
    with torch.device("meta"):
        if new.build().state_dict().keys() != tensors.keys():
            raise ConfigError(f"{name} would have tensors of other names then: train it anew")
    about = replace(version.metadata, name=name, network=new)
    module = replace(version, metadata=about, tensors=tensors).build()
    _check_logits(version, module)

    was = {key: value for key, value in asdict(old).items() if value != getattr(new, key)}
    start = {"name": name, "version": int(version.path.name), "sha256": about.sha256}
    recipe = {**about.recipe, "converted": {"from": start, "was": was, "scaled": scaled}}
    scores = {key: value for key, value in about.evaluation.items() if key != "dropout"}
    return module, replace(about, recipe=recipe, evaluation=scores)


def _changed(old: NetworkConfig, asked: Mapping[str, Any], *, remove: bool) -> NetworkConfig:
    """Describe the new network; refuse one whose eval mode no weights could preserve."""
    if not old.is_builtin:
        raise ConfigError(
            f"only {', '.join(NETWORKS)} can be converted: which weights of {old.kind} read units "
            f"with noise is not known; change its code, and import its weights"
        )
    changes, method = {**asked}, old.regularizer
    if remove and changes.keys() - {"regularizer"}:
        raise ConfigError("give rates or --remove-dropout, not both")
    if remove:
        changes |= dict.fromkeys(("input_dropout", "spatial_dropout", "stochastic_depth"), 0.0)
        changes["dropout"] = (0.0,) * len(old.dropout)
    if not changes:
        raise ConfigError(
            "nothing to convert: give --dropout or --input-dropout with other rates, "
            "--remove-dropout, or --to vanilla or inverted"
        )
    if "regularizer" in changes and method not in CONVENTIONS.values():
        raise ConfigError(f"--to is for vanilla and inverted dropout, not for {method}")
    new = replace(old, **changes)
    on, now = ([p > 0 for p in (*config.dropout, config.input_dropout)] for config in (old, new))
    vit = old.kind == "vit" and "vanilla" in (method, new.regularizer)
    added = "noise with a mean is part of eval mode: only its std can change, and not from or to 0"
    for wrong, why in (
        (new == old, "nothing to convert: the version has this already"),
        (method == "zoneout", "zoneout's eval mode depends on its rate: train another network"),
        (vit, "no weights of a vit can hold the factor of vanilla dropout: train another network"),
        (old.noise_mean and on != now, added),
    ):
        if wrong:
            raise ConfigError(why)
    return new


def _kept(config: NetworkConfig) -> dict[str, float]:
    """Map layers that read units with noise to what eval mode multiplies those by, if it does."""
    if config.regularizer != "vanilla":
        return {}
    layers = [*(f"hidden{i + 1}" for i in range(len(config.hidden))), "logits"]
    first, rates = "conv1" if config.channels else layers[0], config.dropout
    if config.kind != "wrn":
        read = {first: config.input_dropout}
    else:
        blocks = [f"block{i + 1}.conv2" for i in range(len(config.channels) * config.blocks)]
        read = {"conv": config.input_dropout} | dict.fromkeys(blocks, rates[0])
        rates = rates[1:]
    read |= zip(layers[1:], rates, strict=True)
    return {layer: 1 - p for layer, p in read.items()}


def _check_logits(version: Version, module: nn.Module) -> None:
    """Compare with the saved network, in float64, on random images."""
    preprocessing = version.metadata.preprocessing
    pixels = torch.randint(256, (_IMAGES, *preprocessing.shape), generator=torch.Generator())
    x = preprocessing.normalize(pixels.byte()).double()
    with torch.inference_mode():
        expected, got = (each.double()(x) for each in (version.build(), copy.deepcopy(module)))
    difference, largest = float((got - expected).abs().max()), float(expected.abs().max())
    if not difference <= _TOLERANCE * largest:
        raise ConfigError(
            f"logits in eval mode would differ by up to {difference:.3g}, where the largest is "
            f"{largest:.3g}: scaled weights are too large or too small for their type"
        )

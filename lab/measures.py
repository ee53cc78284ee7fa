"""Measures that several experiments take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dropserve.lab.experiment import Figures
from dropserve.lab.run import Run
from dropserve.models.defaults import MaskKind
from dropserve.models.evaluation import score
from dropserve.models.montecarlo import Sampler

ROUNDING = 1e-16
"""Of float64, about: the unit in which differences by rounding are shown."""
_BATCH = 500


def trained(run: Run) -> Figures:
    """Train the setting's network and score it in eval mode, with its curves."""
    run.train()
    return {**scores(run), **run.curves}


def scores(run: Run) -> Figures:
    """Score the network of `run.train` in eval mode, after its last epoch."""
    curves = run.curves
    kept = max(i for i, best in enumerate(curves["best"]) if best)
    found = score(probabilities(run.module, run.test.images, run.normalize), run.test.labels)
    return {
        **found,
        "kept_accuracy": curves["accuracies"][kept],
        "train_accuracy": curves["train_accuracies"][-1],
        "train_nll": curves["train_nlls"][-1],
        "gap": curves["train_accuracies"][-1] - found["accuracy"],
    }


@torch.inference_mode()
def probabilities(
    module: nn.Module, images: Tensor, normalize: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return what eval mode says of images uint8 [N, ...]: [N, C], float64."""
    module.eval()
    rows = [module(normalize(x)).double().softmax(-1) for x in torch.split(images, _BATCH)]
    return torch.cat(rows)


def thinned(
    module: nn.Module,
    images: Tensor,
    normalize: Callable[[Tensor], Tensor],
    samples: int,
    seed: int,
    masks: MaskKind = "stratified",
) -> Tensor:
    """Return what T thinned networks say of images uint8 [N, ...]: [T, N, C], float32."""
    sampler = Sampler(module.eval(), normalize(images[:1]))
    rows = [sampler.sample(normalize(x), samples, seed, masks) for x in torch.split(images, _BATCH)]
    return torch.cat(rows, 1)


def activations(module: nn.Module, x: Tensor, layer: str) -> Tensor:
    """Return what a layer gives for an input x [B, ...], by the mode that the module is in."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:  # noqa: ANN401
        found.append(output.detach())

    handle = module.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.no_grad():
            module(x)
    finally:
        handle.remove()
    return found[0]

"""Monte Carlo dropout three ways: the usual loop, Baal's wrapper, TorchUncertainty's wrapper.

Each makes, of a module in eval mode, a function from a batch, [B, ...], to the probabilities of T
thinned networks, [T, B, C]. Both libraries are left to their defaults, which is one run over the
batch repeated T times.

https://baal.readthedocs.io/en/latest/api/modelwrapper/
https://torch-uncertainty.github.io/auto_tutorials/Bayesian_Methods/tutorial_mc_dropout.html
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Sampled = Callable[[Tensor], Tensor]


def loop(module: nn.Module, samples: int) -> Sampled:
    """Run T passes with nothing but the dropout layers in train mode."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.train()
    return lambda x: torch.stack([module(x).softmax(-1) for _ in range(samples)])


def baal(module: nn.Module, samples: int) -> Sampled:
    """Run Baal's MCDropoutModule through its ModelWrapper."""
    from baal.bayesian.dropout import MCDropoutModule
    from baal.modelwrapper import ModelWrapper, TrainingArgs

    wrapper = ModelWrapper(MCDropoutModule(module), TrainingArgs(use_cuda=False))
    wrapper.eval()
    # its answer is B, C, T
    return lambda x: wrapper.predict_on_batch(x, samples).permute(2, 0, 1).softmax(-1)


def torch_uncertainty(module: nn.Module, samples: int) -> Sampled:
    """Run TorchUncertainty's wrapper in eval mode, where it samples."""
    _let_torchvision_load()
    from torch_uncertainty.methods import mc_dropout

    wrapped = mc_dropout(module, num_estimators=samples).eval()
    return lambda x: wrapped(x).unflatten(0, (samples, len(x))).softmax(-1)


def _let_torchvision_load() -> None:
    """Declare two operators that torchvision expects of its compiled part.

    TorchUncertainty imports torchvision for its plots, and a torchvision for CUDA does not load
    beside a PyTorch without it. Nothing here calls these operators.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


METHODS = {"loop": loop, "baal": baal, "torch_uncertainty": torch_uncertainty}

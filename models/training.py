"""`fit()` trains a module and yields one `Epoch` at a time; an interrupted run resumes exactly.

Everything random (weights' initialisation aside) is drawn from generators seeded by (seed, epoch),
so the state of a run between two epochs is its tensors and a few numbers, and a resumed run on the
CPU ends with the very bits of an unbroken one. Lightning Fabric carries device, precision and
distribution over processes.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dropserve.models.data import Split, augment
from dropserve.models.errors import ConfigError, TrainingDiverged
from dropserve.models.hyperparameters import Recipe
from dropserve.models.training_state import State

Normalize = Callable[[Tensor], Tensor]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
_EVAL_BATCH = 1000
_WORK_OF_A_THREAD = 250_000_000
"""Floating-point operations of a step's forward pass that are worth a thread. Threads wait for each
other in every layer; where other programs want the processor too, for longer than they compute."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images came to.

    Attributes:
        number: from 1.
        loss: mean training loss.
        train_accuracy: on the training batches as they came, augmented and with dropout.
        validation_accuracy: in eval mode, on images held out.
        seconds: of training, validation not counted.
        images_per_second: of training.
        best: whether no earlier epoch was better on the held-out images.
    """

    number: int
    loss: float
    train_accuracy: float
    validation_accuracy: float
    seconds: float
    images_per_second: float
    best: bool


def launch(accelerator: str = "auto", devices: int = 1, precision: Precision = "32-true") -> Fabric:
    """Choose where to train; with several devices, start this program again for each of the others.

    Args:
        accelerator: "auto", "cpu", "cuda", "mps".
        devices: processes, a device each; a batch is divided among them.
        precision: "32-true", "bf16-mixed", "16-mixed".
    """
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)
    fabric.launch()
    return fabric


def with_threads(recipe: Recipe, module: nn.Module, example: Tensor) -> Recipe:
    """Choose the CPU threads by the network's size where the recipe does not say.

    Args:
        recipe: how the module will be trained.
        module: the network.
        example: one normalised image [1, C, H, W].
    """
    if recipe.threads is not None:
        return recipe
    with FlopCounterMode(display=False) as counter:
        module.eval()(example)
    worth = counter.get_total_flops() * recipe.batch_size // _WORK_OF_A_THREAD
    return replace(recipe, threads=max(1, min(worth, torch.get_num_threads())))


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Have PyTorch compute with so many threads for the length of the block; None: as it is set."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(
    module: nn.Module,
    data: Split,
    normalize: Normalize,
    recipe: Recipe,
    *,
    state_path: Path | None = None,
    description: Mapping[str, Any] | None = None,
    fabric: Fabric | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[Epoch]:
    """Train in place; when the iterator is exhausted, the module holds its best weights.

    Args:
        module: maps normalised images to logits.
        data: images to train and validate on.
        normalize: maps uint8 [B, C, H, W] to the module's input.
        recipe: how.
        state_path: a file that holds the run's state after each epoch. If it is there, the run
            continues from it.
        description: what else a state must have been made with to be continued, by its name: the
            network's config, say.
        fabric: where to train, from `launch()`; None: one device of whatever there is.
        progress: called with (images done, images in all) of the epoch that runs.

    Raises:
        ConfigError: the state is of another run, there are too few images, or a batch cannot be
            divided among the processes.
        TrainingDiverged: the loss is not finite; the state is that of the epoch before.
        CheckpointRefused: the state file is damaged.
    """
    train, validation = _hold_out(data, recipe)
    fabric = fabric or launch()
    if recipe.batch_size % fabric.world_size:
        raise ConfigError(f"batch_size must be a multiple of {fabric.world_size}, the processes")
    fingerprint = _fingerprint(module, recipe, data, description or {})
    state = State(module, _optimizer(module, recipe), fingerprint)
    if state_path is not None and state_path.exists():
        state.restore(state_path)
    wrapped, optimizer = fabric.setup(module, state.optimizer)
    batches = _Batches(fabric, train, normalize, recipe)
    while state.epoch < recipe.epochs and not state.exhausted(recipe.patience):
        with cpu_threads(recipe.threads):
            started = time.perf_counter()
            module.train()
            with torch.random.fork_rng():
                torch.manual_seed(_derived_seed(recipe.seed, state.epoch, fabric.global_rank))
                loss, accuracy = _train_epoch(
                    fabric, wrapped, optimizer, batches, recipe, state.epoch, progress
                )
            seconds = time.perf_counter() - started
            if not math.isfinite(loss):
                raise TrainingDiverged(
                    f"epoch {state.epoch + 1}: the loss is not finite; lower the learning rate"
                )
            score, loss_held_out = fabric.broadcast(
                validate(module, validation, normalize, fabric.device)
            )
            best = state.finish_epoch(score, loss_held_out)
            if state_path is not None and fabric.is_global_zero:
                state.write(state_path)
        speed = batches.steps * min(recipe.batch_size, len(train)) / seconds
        yield Epoch(state.epoch, loss, accuracy, score, seconds, speed, best)
    state.load_best()
    module.cpu().eval()


@torch.inference_mode()
def validate(
    module: nn.Module, data: Split, normalize: Normalize, device: torch.device | None = None
) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy, in nats, over all images in eval mode."""
    module.eval()
    right, loss = 0, 0.0
    for batch in data.batches(_EVAL_BATCH):
        logits = module(normalize(batch.images.to(device))).cpu()
        right += int((logits.argmax(-1) == batch.labels).sum())
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
    return right / len(data), loss / len(data)


class _Batches:
    """Shuffled, augmented, normalised batches of one epoch after the other, on the device."""

    def __init__(self, fabric: Fabric, data: Split, normalize: Normalize, recipe: Recipe) -> None:
        self._data = Split(data.images.to(fabric.device), data.labels.to(fabric.device))
        self._normalize = normalize
        self._recipe = recipe
        self._share = slice(fabric.global_rank, None, fabric.world_size)
        self.steps = max(1, len(data) // recipe.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (input, labels), this process's share; a last, smaller batch is left out."""
        size = self._recipe.batch_size
        generator = torch.Generator().manual_seed(_derived_seed(self._recipe.seed, number, -1))
        order = torch.randperm(len(self._data), generator=generator)
        order = order.to(self._data.labels.device)
        for step in range(self.steps):
            batch = self._data.take(order[step * size : (step + 1) * size][self._share])
            images = augment(batch.images, self._recipe.shift, self._recipe.flip)
            yield self._normalize(images), batch.labels


def _train_epoch(
    fabric: Fabric,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: _Batches,
    recipe: Recipe,
    epoch: int,
    progress: Callable[[int, int], None],
) -> tuple[float, float]:
    """One pass; returns the mean loss and the accuracy on the batches as they came."""
    sums = torch.zeros(3, device=fabric.device)  # of loss, right answers, images
    for step, (x, labels) in enumerate(batches.epoch(epoch)):
        share = (epoch * batches.steps + step) / (recipe.epochs * batches.steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(share)
        logits = module(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        right = (logits.detach().argmax(-1) == labels).sum()
        sums += torch.stack([loss.detach() * len(labels), right, right.new_tensor(len(labels))])
        progress((step + 1) * recipe.batch_size, batches.steps * recipe.batch_size)
    summed = fabric.all_reduce(sums, reduce_op="sum")
    return float(summed[0] / summed[2]), float(summed[1] / summed[2])


def _schedule(share: float, warm_up: float = 0.05) -> float:
    """Scale the learning rate by the share of the run that is done: linear up, half cosine down."""
    if share < warm_up:
        return (share + 1e-3) / (warm_up + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))


def _hold_out(data: Split, recipe: Recipe) -> tuple[Split, Split]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed))
    held_out = max(1, round(len(data) * recipe.validation_share))
    if len(data) - held_out < 2:
        raise ConfigError(f"{len(data)} images are too few to train and validate on")
    return data.take(order[held_out:]), data.take(order[:held_out])


def _optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Decay matrices and kernels; not vectors, which are biases and norms."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True, fused=True)


def _fingerprint(
    module: nn.Module, recipe: Recipe, data: Split, description: Mapping[str, Any]
) -> str:
    """Say what a state must have been made with to continue it: layers, rates, recipe, images."""
    parts = {"module": repr(module), "recipe": asdict(recipe), "data": data.digest()}
    return json.dumps({**description, **parts}, sort_keys=True)


def _derived_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Give each epoch and process a seed of its own; rank -1 is for what all processes share.

    Odd constants without a small multiple in common keep the sums apart.
    """
    return (seed + (epoch + 1) * 0x4F1BBCDCBFA53E0B + rank * 0x6C8E9CF570932BD5) % 2**63

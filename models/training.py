"""`fit()` trains a module and yields one `Epoch` at a time; an interrupted run resumes exactly.

Everything random (weights' initialisation aside) is drawn from generators seeded by (seed, epoch),
so the state of a run between two epochs is its tensors and a few numbers, and a resumed run on the
CPU ends with the same bits as an unbroken one. Lightning Fabric handles device, precision and
distribution over processes, whose gradients are those of the whole batch; `processes.py` has what
they share. A state file that is damaged raises CheckpointRefused.
"""

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dropserve.models import processes, storage
from dropserve.models.data import Split, augment
from dropserve.models.errors import CheckpointRefused, ConfigError, TrainingDiverged
from dropserve.models.hyperparameters import Recipe
from dropserve.models.regularizers import begin_epoch

Normalize = Callable[[Tensor], Tensor]
_THREAD_FLOPS = 250_000_000
"""Floating-point operations of a step's forward pass that are worth a thread. Threads wait for each
other in every layer; where other programs want the processor too, for longer than they compute."""
_MAX_STATE_BYTES = 32 * 2**30
_BLANK = b"0" * 64
_CHECKSUM = re.compile(rb'(?<="sha256":")([0-9a-f]{64})(?=")')
"""A state file's own SHA-256 in its header: of all bytes, with `_BLANK` in the digest's place."""
_PARTS = {
    "module": "network", "from": "version to start from", "on": "[precision, processes]",
}  # fmt: skip
"""What the parts of a run's description are called, where it is not by their names."""


@dataclass(frozen=True)
class Epoch:
    """Results of one pass over the training images."""

    number: int  # from 1
    loss: float
    train_accuracy: float  # on the training batches as they came, augmented and with dropout
    validation_accuracy: float  # in eval mode, on images held out
    seconds: float  # of training, validation not counted
    images_per_second: float
    best: bool  # whether no earlier epoch was better on the held-out images


def with_threads(recipe: Recipe, module: nn.Module, example: Tensor) -> Recipe:
    """Choose the CPU threads by the work for one image [1, C, H, W], if the recipe does not say."""
    if recipe.threads is not None:
        return recipe
    with FlopCounterMode(display=False) as counter:
        module.eval()(example)
    worth = counter.get_total_flops() * recipe.batch_size // _THREAD_FLOPS
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
    accumulate: int = 1,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[Epoch]:
    """Train in place; when the iterator is exhausted, the module holds its best weights.

    Args:
        module: maps normalised images to logits.
        data: images to train and validate on.
        normalize: maps uint8 [B, C, H, W] to the module's input.
        recipe: how.
        state_path: holds the run's state after each epoch. If it exists, the run continues from it.
            Of several processes, the first alone reads and writes it.
        description: what else a state must have been made with: the network's config, say.
        fabric: from `processes.launch()`; None: one device of whatever there is.
        accumulate: parts of a batch that are run one after another, to save memory. Gradients are
            those of the whole batch; noise is drawn, and a batch normalised, part by part.
        progress: called with (images done, images in all) of the current epoch.

    Raises:
        ConfigError: the state is of another run, there are too few images, a batch cannot be
            divided, or the processes have other data or options than the first.
        DataError: an image's file has changed; the state is that of the epoch before.
        ProcessLost: another process has ended, or cannot be reached; likewise.
        TrainingDiverged: the loss is not finite; the state is that of the epoch before.
        CheckpointNotWritten: the state cannot be written; it is that of an epoch before.
    """
    fabric = fabric or processes.launch()
    size, rank, count = recipe.batch_size, fabric.global_rank, fabric.world_size
    if size % (count * accumulate):
        parts = f"{count}, the processes" + f", times {accumulate}, the parts" * (accumulate > 1)
        raise ConfigError(f"batch_size must be a multiple of {parts}")
    train, validation = divide(data, recipe)
    train = train.to(fabric.device)
    size = min(size, len(train) // (count * accumulate) * count * accumulate)
    if not size:
        raise ConfigError(f"{len(data)} images are too few for {count} x {accumulate} parts")
    steps = len(train) // size  # of an epoch; a last, smaller batch is left out
    made_with = {"module": repr(module), "recipe": asdict(recipe), "data": data.digest()}
    state = State(module, build_optimizer(module, recipe), {**(description or {}), **made_with})
    with processes.losses_named(fabric, "start"):
        state.begin(state_path, fabric)
        wrapped, optimizer = fabric.setup(module, state.optimizer)
    while state.epoch < recipe.epochs and not state.exhausted(recipe.patience):
        shuffling = torch.Generator().manual_seed(_derived_seed(recipe.seed, state.epoch, -1))
        order = torch.randperm(len(train), generator=shuffling)
        shares = (batch[rank::count] for batch in torch.split(order[: steps * size], size))
        sums = torch.zeros(3, device=fabric.device)  # of loss, right answers, images
        lost = processes.losses_named(fabric, f"epoch {state.epoch + 1}")
        with lost, cpu_threads(recipe.threads), torch.random.fork_rng():
            torch.manual_seed(_derived_seed(recipe.seed, state.epoch, rank))
            started = time.perf_counter()
            module.train()
            begin_epoch(module)
            for step, batch in enumerate(train.read(shares)):
                for group in optimizer.param_groups:
                    done = (state.epoch * steps + step) / (recipe.epochs * steps)
                    group["lr"] = recipe.learning_rate * _schedule(recipe.schedule, done)
                batch = batch.to(fabric.device)
                images = augment(batch.images, recipe.shift, recipe.flip)
                optimizer.zero_grad()
                chunks = zip(images.chunk(accumulate), batch.labels.chunk(accumulate), strict=True)
                for part, (pixels, labels) in enumerate(chunks, 1):
                    with fabric.no_backward_sync(wrapped, enabled=part < accumulate):
                        logits = wrapped(normalize(pixels))
                        loss = F.cross_entropy(
                            logits, labels, label_smoothing=recipe.label_smoothing
                        )
                        fabric.backward((loss + penalty(module, recipe.l1)) / accumulate)
                    right = (logits.detach().argmax(-1) == labels).sum()
                    seen = right.new_tensor(len(labels))
                    sums += torch.stack([loss.detach() * len(labels), right, seen])
                optimizer.step()
                project(module, recipe.max_norm)
                progress((step + 1) * size, steps * size)
            total, hits, images_seen = map(float, fabric.all_reduce(sums, reduce_op="sum"))
            seconds = time.perf_counter() - started
            if not math.isfinite(total):
                reason = "the loss is not finite; lower the learning rate"
                raise TrainingDiverged(f"epoch {state.epoch + 1}: {reason}")
            own = json.dumps(validate(module, validation, normalize, fabric.device)).encode()
            accuracy, validation_loss = json.loads(processes.broadcast_bytes(fabric, own))
            best = state.finish_epoch(accuracy, validation_loss)
            if state_path is not None and fabric.is_global_zero:
                state.write(state_path)
        means = total / images_seen, hits / images_seen
        yield Epoch(state.epoch, *means, accuracy, seconds, images_seen / seconds, best)
    module.load_state_dict(state.best)
    module.cpu().eval()


def divide(data: Split, recipe: Recipe) -> tuple[Split, Split]:
    """Choose by the seed what is trained on, and what is held out; ConfigError: too few images."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed))
    held_out = max(1, round(len(data) * recipe.validation_share))
    if len(data) - held_out < 2:
        raise ConfigError(f"{len(data)} images are too few to train and validate on")
    return data.take(order[held_out:]), data.take(order[:held_out])


@torch.inference_mode()
def validate(
    module: nn.Module, data: Split, normalize: Normalize, device: torch.device | None = None
) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy, in nats, over all images in eval mode."""
    module.eval()
    right, loss = 0, 0.0
    for batch in data.batches(1000):
        logits = module(normalize(batch.images.to(device))).cpu()
        right += int((logits.argmax(-1) == batch.labels).sum())
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
    return right / len(data), loss / len(data)


def _schedule(kind: str, done: float, warm_up: float = 0.05) -> float:
    """Scale the learning rate by the share of the run that is done: linear up, half cosine down.

    A constant one stays as it is from the first step on.
    """
    if kind == "constant":
        return 1.0
    if done < warm_up:
        return (done + 1e-3) / (warm_up + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def penalty(module: nn.Module, l1: float) -> Tensor | float:
    """Return the sum of the absolute values of all weight matrices and kernels, times `l1`."""
    return l1 * sum(weight.abs().sum() for weight in _weights(module)) if l1 else 0.0


@torch.no_grad()
def project(module: nn.Module, max_norm: float | None) -> None:
    """Scale each unit's incoming weights, a row [out, ...] each, to a norm of at most `max_norm`.

    Section 5.1 of Srivastava et al., "Dropout" (JMLR 2014); for the logits too.
    """
    if max_norm is not None:
        for weight in _weights(module):
            weight.renorm_(2, 0, max_norm)


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """List weight matrices and kernels [out, ...]."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and "weight" in name:
            yield parameter


def build_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Decay matrices and kernels; vectors, which are biases and norms, only if asked to."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    decay = recipe.weight_decay
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {
            "params": [p for p in parameters if p.dim() <= 1],
            "weight_decay": decay if recipe.decay_biases else 0.0,
        },
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True, fused=True)


def _derived_seed(seed: int, epoch: int, rank: int) -> int:
    """Give each epoch and process a seed of its own; rank -1 is for what all processes share.

    Odd constants without a small multiple in common keep the sums apart.
    """
    return (seed + (epoch + 1) * 0x4F1BBCDCBFA53E0B + rank * 0x6C8E9CF570932BD5) % 2**63


class State:
    """State of a run between two epochs, from which it resumes exactly.

    `made_with` describes the run, for JSON; a state of another description is not continued.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, made_with: Mapping[str, Any]
    ) -> None:
        self.optimizer = optimizer
        self.epoch = 0  # finished ones
        self.best: dict[str, Tensor] = module.state_dict()
        self._module = module
        self._made_with = json.dumps(made_with, sort_keys=True)
        self._best_score = (-1.0, 0.0)
        self._best_epoch = 0

    def finish_epoch(self, accuracy: float, loss: float) -> bool:
        """Count an epoch; say if it is the best, whose weights are kept.

        Among epochs of the same accuracy, of which small sets have many, the lowest loss is best.
        """
        self.epoch += 1
        score = (accuracy, -loss)
        if score <= self._best_score:
            return False
        self._best_score, self._best_epoch = score, self.epoch
        self.best = {n: t.detach().cpu().clone() for n, t in self._module.state_dict().items()}
        return True

    def exhausted(self, patience: int) -> bool:
        """Say if `patience` epochs have passed since the best one."""
        return patience > 0 and self.epoch - self._best_epoch >= patience

    def write(self, path: Path) -> None:
        """Replace the last state, whole or not at all; CheckpointNotWritten."""
        tensors = {f"module.{n}": t for n, t in self._module.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{n}": t for n, t in slots.items() if t is not None}
        metadata = {
            "fingerprint": self._made_with,
            "epoch": str(self.epoch),
            "best_score": json.dumps(self._best_score),
            "best_epoch": str(self._best_epoch),
            "sha256": _BLANK.decode(),
        }
        head, _, rest = _CHECKSUM.split(storage.dump_tensors(path, tensors, metadata), 1)
        with storage.changing(path, "write the run's state"):
            storage.make_folder(path.parent)
            storage.replace_durably(path, b"".join((head, _digest(head, rest), rest)))

    def begin(self, path: Path | None, fabric: Fabric) -> None:
        """Continue from a state, if the first process has one; others need not see its file.

        ConfigError: a process has other data or options than the first, threads apart.
        """
        first = processes.broadcast_bytes(fabric, self._made_with.encode()).decode()
        found = [d for d in _differences(first, self._made_with) if not d.startswith("threads ")]
        processes.check_all(fabric, "; ".join(found))
        self._made_with = first
        here = path is not None and fabric.is_global_zero and path.exists()
        raw = storage.read_once(path, _MAX_STATE_BYTES) if path is not None and here else b""
        if path is not None and (raw := processes.broadcast_bytes(fabric, raw)):
            self.restore(path, raw)

    def restore(self, path: Path, raw: bytes | None = None) -> None:
        """Continue from a state written by `write()`; ConfigError: it belongs to another run.

        `raw` are the file's bytes, if they were read already.
        """
        tensors, metadata = _read_state(path, raw)
        try:
            differences = list(_differences(metadata["fingerprint"], self._made_with))
            if not differences:
                self._restore(tensors, metadata)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointRefused(path, f"not this network's state: {error}") from error
        if differences:
            other = f"another network, recipe or data ({'; '.join(differences)})"
            remedy = "resume it with the options it was started with, or discard it with --restart"
            raise ConfigError(f"{path} holds a run of {other}; {remedy}")

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self._module.load_state_dict(parts["module"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = tensor
        # The optimizer must neither miss something nor take what is not a parameter's.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = next(iter(slots.values()), {}).keys()
        for number, slot_tensors in slots.items():  # an unused parameter has none
            shapes = (torch.Size(), parameters[number].shape)
            fits = all(t.shape in shapes for t in slot_tensors.values())
            if not fits or slot_tensors.keys() != names:
                raise ValueError(f"the optimizer's state of parameter {number} does not fit")
            for name, tensor in slot_tensors.items():
                if tensor.dim() == 4:  # it was read as contiguous, and rounding depends on it
                    slot_tensors[name] = torch.empty_like(parameters[number].data).copy_(tensor)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.best = parts["best"]
        self.epoch, self._best_epoch = int(metadata["epoch"]), int(metadata["best_epoch"])
        if self.best.keys() != parts["module"].keys():
            raise ValueError("not all of the best weights are there")
        accuracy, loss = json.loads(metadata["best_score"])
        self._best_score = (float(accuracy), float(loss))


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other runs of the model out of a state's folder.

    Raises:
        ConfigError: another one has it.
        CheckpointNotWritten: it cannot be made or locked.
    """
    with ExitStack() as held:
        with storage.changing(folder, "prepare the run's folder"):
            try:
                held.enter_context(storage.alone_in(folder))
            except BlockingIOError as error:
                reason = "another run of this model is in progress"
                raise ConfigError(f"{folder}: {reason}") from error
        yield


def discard(state: Path) -> None:
    """Remove the folder of a run that is done; CheckpointNotWritten."""
    with storage.changing(state.parent, "remove the run's state"):
        shutil.rmtree(state.parent)


def earlier_run(state: Path, *, resume: bool, restart: bool) -> int:
    """Say how many epochs of an interrupted run will be resumed; `restart` removes its state.

    ConfigError: there is one, and neither was asked for.
    """
    if restart:
        state.unlink(missing_ok=True)
    if not state.exists():
        return 0
    finished = int(_read_state(state)[1]["epoch"])
    if not resume:
        remedy = "continue it with --resume, or discard it with --restart"
        raise ConfigError(f"{state}: a run was interrupted after epoch {finished}; {remedy}")
    return finished


def _read_state(path: Path, raw: bytes | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    raw = storage.read_once(path, _MAX_STATE_BYTES) if raw is None else raw
    parts = _CHECKSUM.split(raw, 1)
    if len(parts) == 1:
        reason = "damaged, or written by an earlier release of Dropserve, which can finish the run"
        raise CheckpointRefused(path, f"without a checksum: {reason}; --restart discards it")
    head, stated, rest = parts
    if (got := _digest(head, rest)) != stated:
        reason = f"damaged: its SHA-256 is {got.decode()}, it says {stated.decode()}"
        raise CheckpointRefused(path, f"{reason}; --restart discards it")
    metadata = storage.check_header(path, raw)["__metadata__"]
    if not re.fullmatch("[1-9][0-9]*", metadata.get("epoch", "")):
        raise CheckpointRefused(path, "no finished epoch in it; --restart discards it")
    return storage.parse_tensors(path, raw), metadata


def _digest(head: bytes, rest: bytes) -> bytes:
    return hashlib.sha256(b"".join((head, _BLANK, rest))).hexdigest().encode()


def _differences(held: str, asked: str) -> Iterator[str]:
    """Say where two descriptions differ: a recipe field by field, all else by its name."""
    parts = json.loads(held), json.loads(asked)
    then, now = ({**part, **part.get("recipe", {}), "recipe": None} for part in parts)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            changed = f"{_PARTS.get(name, name)} was {then.get(name)}, now is {now.get(name)}"
            shown = name == "on" or hasattr(Recipe, name)
            yield changed if shown else f"another {_PARTS.get(name, name)}"

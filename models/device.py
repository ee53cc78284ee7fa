"""The device that networks run on, and copies to it and back: one for several tensors.

A GPU works through a queue of calls while Python goes on. A copy back waits for the queue.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dropserve.models.defaults import Device
from dropserve.models.errors import ConfigError

_TILE = 2**24
"""Elements of the widest result on a GPU, 64 MiB of float32: enough to occupy it. Not measured."""


def find_device(name: Device = "auto") -> torch.device:
    """Return the device of that name, "auto" for a GPU if there is one.

    Convolutions on a GPU then compute float32 in full, as on a CPU; PyTorch's default there is
    TF32, which has ten bits. Raises ConfigError if there is no GPU for "cuda".
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        remedy = (
            "its driver sees none: try nvidia-smi here; a container must be given the GPU"
            if torch.version.cuda
            else f"PyTorch {torch.__version__} is built for CPUs alone: install a CUDA build"
        )
        raise ConfigError(f"no GPU for the device cuda: {remedy}, or choose the device cpu or auto")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", torch.cuda.current_device())


def is_gpu(device: torch.device) -> bool:
    """Say if calls on a device are queued, and its memory is its own."""
    return device.type == "cuda"


def tile(device: torch.device, of_cpu: int) -> int:
    """Return how many elements the widest result may hold: `of_cpu`, for its caches, or more."""
    return _TILE if is_gpu(device) else of_cpu


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of the CPU to a device, in one copy that is not waited for; a CPU has them."""
    if not is_gpu(device):
        return [*tensors]
    pinned = _pack(tensors, pin_memory=True)  # or the call would wait for the copy
    return _unpack(pinned.to(device, non_blocking=True), tensors)


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device to the CPU, in one copy that waits for what computes them."""
    if not is_gpu(tensors[0].device):
        return [*tensors]
    return _unpack(_pack(tensors).cpu(), tensors)


def gpu_failure() -> str | None:
    """Say why the GPU runs no call of this process any more, as after a fault; None: it does."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # PyTorch's is
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).partition("\n")[0]
    return None


class OneStepAhead:
    """Lets Python queue one step of a longer job on a GPU while the GPU works on the one before.

    Other work queued between two steps then waits for those two at most, and the GPU is never idle.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = is_gpu(device)
        self._before: torch.cuda.Event | None = None

    def wait(self) -> None:
        """End a step: wait for the end of the step before it."""
        if self._is_gpu:
            end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # PyTorch's is
            end.record()
            if self._before is not None:
                self._before.synchronize()
            self._before = end


def _pack(tensors: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
    """Put the bytes of tensors into one, in the order of `_by_width`."""
    parts = [tensors[i].flatten().view(torch.uint8) for i in _by_width(tensors)]
    packed = torch.empty(
        sum(map(len, parts)),
        dtype=torch.uint8,
        device=tensors[0].device,
        pin_memory=pin_memory,
    )
    return torch.cat(parts, out=packed)


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    order = _by_width(like)
    parts = torch.split(packed, [like[i].nbytes for i in order])
    found = {
        i: part.view(like[i].dtype).view(like[i].shape)
        for i, part in zip(order, parts, strict=True)
    }
    return [found[i] for i in range(len(like))]


def _by_width(tensors: Sequence[Tensor]) -> list[int]:
    """List the places of tensors, the widest elements first: then each part is aligned."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())

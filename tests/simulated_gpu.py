"""A GPU of pretence: tensors that say they are on one, and lie on the CPU.

As on a GPU, a call that mixes them with tensors of the CPU raises, NumPy cannot read them, and
nothing leaves but by a copy or by a call that waits for a number. Both are counted. It shows where
tensors are and that figures are right, not that CUDA's kernels do what the CPU's do. Autograd does
not work: it ends the process.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dropserve.models import preprocessing

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero"}


class OnGPU(torch.Tensor):
    """A tensor whose device is a GPU; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        about = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return cls._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=GPU, **about)

    def __init__(self, held):
        self.held = held

    def __deepcopy__(self, memo):
        copied = OnGPU(self.held.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __tensor_flatten__(self):  # modules then replace their parameters by it
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGPU(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, Counter())


class _Unguarded(TorchFunctionMode):
    """Replaces methods that set CUDA's current device before they call an operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _UNGUARDED and args[0].device == GPU:
            func = _UNGUARDED[func]
        return func(*args, **(kwargs or {}))


def _index(x, index):
    index = list(index) if isinstance(index, tuple) else [index]
    index = [torch.tensor(i, device=GPU) if isinstance(i, list) else i for i in index]
    if Ellipsis in [i for i in index if not isinstance(i, torch.Tensor)]:
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        named = sum(i is not None for i in index) - 1
        index[at : at + 1] = [slice(None)] * (x.dim() - named)
    dim, tensors = 0, [None] * x.dim()
    for i in index:
        if i is None:
            x = x.unsqueeze(dim)
            tensors.append(None)
        elif isinstance(i, int):
            x = x.select(dim, i)
            continue
        elif isinstance(i, slice):
            if i != slice(None):
                x = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
        else:
            tensors[dim] = i
        dim += 1
    while tensors and tensors[-1] is None:
        tensors.pop()
    return torch.ops.aten.index(x, tensors) if tensors else x.view(x.shape)


def _replace(x, data):
    x.held = data.held


_UNGUARDED = {
    torch.Tensor.__getitem__: _index,
    torch.Tensor.contiguous: torch.ops.aten.contiguous,
    torch.Tensor.copy_: torch.ops.aten.copy_,
    torch.Tensor.data.__set__: _replace,
    torch.Tensor.__float__: torch.Tensor.item,
}


class _Factories(TorchDispatchMode):
    """Makes tensors on the GPU where a call asks for it, and counts."""

    def __init__(self, counts):
        super().__init__()
        self._counts = counts

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, self._counts)


def _call(func, args, kwargs, counts):
    """Run an operation on the CPU; what it gives is on the GPU if it was asked for, or read."""
    name = func._schema.name.removeprefix("aten::")
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
    on_gpu = {id(x.held): x for x in tensors if isinstance(x, OnGPU)}
    target = given.get("device") or (GPU if on_gpu else CPU)
    if name == "copy_":
        _count(counts, given["src"].device, given["self"].device)
    elif name in ("to", "_to_copy"):
        _count(counts, given["self"].device, target, waits=not given.get("non_blocking"))
    elif on_gpu and any(x.dim() for x in tensors if not isinstance(x, OnGPU)):
        raise RuntimeError(f"{name}: tensors of two devices")
    elif on_gpu and name in _WAITS:
        counts["waits for a number"] += 1
    given = {key: x for key, x in kwargs.items() if key != "pin_memory"}
    args, kwargs = tree_map(_bare, (args, given))
    inference = tensors[0].is_inference() if func.is_view else torch.is_inference_mode_enabled()

    def wrapped(x):
        if not isinstance(x, torch.Tensor) or target == CPU:
            return x
        with torch.inference_mode(inference):
            return on_gpu[id(x)] if id(x) in on_gpu else OnGPU(x)

    return tree_map(wrapped, func(*args, **kwargs))


def _count(counts, source, target, *, waits=True):
    if source != target:
        how = "" if waits or target == CPU else ", not waited for"
        counts[f"in{how}" if target == GPU else "out"] += 1


def _bare(x):
    return CPU if isinstance(x, torch.device) else x.held if isinstance(x, OnGPU) else x


@contextmanager
def simulated_gpu():
    """Have PyTorch find a GPU within the block; yields counts of copies and waits."""
    counts = Counter()

    class Event:
        def __init__(self, **_):
            counts["events"] += 1

        def record(self):
            """Mark the end of what is queued."""

        def synchronize(self):
            counts["waits for an event"] += 1

    found = {
        "is_available": lambda: True, "current_device": lambda: 0, "_lazy_init": lambda: None,
        "get_device_name": lambda _device: "simulated", "Event": Event,
        "is_bf16_supported": lambda **_: False,
    }  # fmt: skip
    lifted = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **found))
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device=GPU) then asks the mode
        tf32 = torch.backends.cudnn.allow_tf32
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", tf32)
        stack.callback(preprocessing._affine.cache_clear)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Factories(counts))
        stack.enter_context(_Unguarded())
        yield counts

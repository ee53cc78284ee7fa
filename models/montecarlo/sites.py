"""Where a network draws noise: found by running a copy in training mode without it."""

import hashlib
import os
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from dropserve.models.errors import NoDropout, UnsupportedModule, unsupported_if_it_fails
from dropserve.models.montecarlo.interception import Interception
from dropserve.models.montecarlo.training_copy import (
    NumPyGenerator,
    numpy_generators,
    share_parameters,
    training_copy,
)
from dropserve.models.regularizers import Law


@dataclass(frozen=True)
class Site:
    """One draw of noise in a forward pass.

    Attributes:
        name: the module it was drawn in; `:kind` follows where that does more than drop, `[2]`
            where the same module draws a second time.
        law: the noise's.
        shape: what one image's noise covers: units, channels, weights [out, in + 1], or steps and
            units of a recurrent network.
        template: the noise's shape for a batch of one, as the call gets it.
        batch_dim: the dimension of `template` that grows with the batch; None if none does.
        images_inside: whether that dimension, where it holds several rows an image, counts the
            images within a row, and not the rows within an image.
    """

    name: str
    law: Law
    shape: tuple[int, ...]
    template: tuple[int, ...]
    batch_dim: int | None
    images_inside: bool = False

    @property
    def module(self) -> str:
        """The name without its kind."""
        return self.name.replace(f":{self.kind}", "")

    @property
    def kind(self) -> str:
        """The method, as the API names it."""
        return self.law.kind

    @property
    def p(self) -> float | None:
        """Probability of dropping; None where the method has no rate."""
        return self.law.p

    @property
    def units(self) -> int:
        """How many numbers are drawn."""
        return torch.Size(self.template).numel()

    def fit(self, scale: Tensor, shape: torch.Size) -> Tensor | None:
        """Spread noise `scale` [*template] over a call's `shape`; None if it does not fit.

        A batch dimension may hold several rows an image: attention folds its heads into it, and
        recurrent networks their time.
        """
        dim = self.batch_dim
        if dim is None or len(shape) != len(self.template):
            return scale if shape == self.template else None
        rows = self.template[dim]
        images, rest = divmod(shape[dim], rows)
        if rest or (*shape[:dim], rows, *shape[dim + 1 :]) != self.template:
            return None
        if rows == 1:
            return scale
        place = dim + 1 if self.images_inside else dim
        spread = (*self.template[:place], images, *self.template[place:])
        return scale.unsqueeze(place).expand(spread).reshape(shape)


@dataclass(frozen=True)
class Trace:
    """What was found in a module.

    Attributes:
        sites: its dropout calls, in the order of a forward pass.
        widest: elements in the widest result that depends on noise, of one image.
        widest_shared: likewise, of results that images share, such as weights.
        classes: columns of its output.
    """

    training_copy: nn.Module
    sites: tuple[Site, ...]
    widest: int
    widest_shared: int
    classes: int


class _Call(NamedTuple):
    name: str
    law: Law
    shape: torch.Size


class _Pass(NamedTuple):
    output: Tensor
    calls: list[_Call]
    sizes: list[int]


_MODULE_CHANGED = (
    "after a copy of the module ran in training mode, the module is another in eval mode: let "
    "train() and forward change nothing but attributes of the module"
)
_MORE_THAN_DROPOUT = (
    "with its dropout switched off, the module computes other logits in training mode than in "
    "eval mode: let nothing but dropout depend on self.training (no auxiliary heads, no statistics "
    "of the batch), and multiply by masks of bernoulli_ as floating-point numbers"
)


def trace(module: nn.Module, probe: Tensor) -> Trace:
    """Copy a module in eval mode into training mode, run the copy and note every dropout call.

    It runs the two images of `probe` [2, ...] and three: the dimension of a mask that differs
    between the two is its batch dimension, wherever the module put it. Without the noise of dropout
    it must compute what the module does in eval mode.

    Raises NoDropout if it calls none; UnsupportedModule if it has a dropout that no mask can reach,
    other randomness, an output that is not logits [B, C], or another behaviour in training mode
    than dropout.
    """
    _refuse_unreachable(module)
    expected, dropouts = _run_in_eval_mode(module, probe)  # makes the parameters of lazy modules
    before = _state(module)
    copied = training_copy(module)
    try:
        two, three = _run_in_training_mode(copied, probe, expected)
        share_parameters(copied, module)
        logits, now = _run_in_eval_mode(module, probe)
        _require_same(logits, expected, _MODULE_CHANGED)
        if (now, _state(module)) != (dropouts, before):
            raise UnsupportedModule(_MODULE_CHANGED)  # noqa: TRY301  its cleanup is below
    except UnsupportedModule:
        copied.eval()  # what its train() has changed outside of it, code of its eval() may undo
        raise
    if not two.calls:
        raise NoDropout(
            "the module calls no dropout with p > 0 in training mode, so every Monte Carlo sample "
            "would be the same: add dropout (models.dropout.InvertedDropout or torch.nn.Dropout) "
            "and train"
        )
    if [call[:2] for call in two.calls] != [call[:2] for call in three.calls]:
        raise UnsupportedModule(
            "the module's dropout calls change with the size of the batch, or from pass to pass"
        )
    pairs = zip(two.calls, three.calls, strict=True)
    sites = tuple(_site(call, other.shape) for call, other in pairs)
    sizes = [(a, b - a) for a, b in zip(two.sizes, three.sizes, strict=False)]
    widest = max(growth for _, growth in sizes)
    shared = max((size for size, growth in sizes if not growth), default=0)
    return Trace(copied, sites, widest, shared, two.output.shape[1])


def _refuse_unreachable(module: nn.Module) -> None:
    for name, child in module.named_modules():
        where = name or "the module"
        if isinstance(child, nn.RNNBase) and child.dropout > 0 and child.num_layers > 1:
            raise UnsupportedModule(
                f"{where}: no mask can reach the dropout between the layers of "
                f"nn.{type(child).__name__}(num_layers={child.num_layers}, "
                f"dropout={child.dropout}); stack single-layer ones with nn.Dropout between them"
            )
        if isinstance(child, torch.jit.ScriptModule):
            raise UnsupportedModule(
                f"{where}: no mask can reach dropout inside TorchScript; give the Python module"
            )


def _run_in_eval_mode(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Run a module in eval mode; switch off, and count, dropout that is on all the same."""
    laws: list[Law] = []
    interception = Interception(lambda law, _: laws.append(law), running_statistics=False)
    with torch.no_grad():
        return _logits(interception.run(module, x), "eval mode"), len(laws)


def _run_in_training_mode(
    copied: nn.Module, probe: Tensor, expected: Tensor
) -> tuple[_Pass, _Pass]:
    """Run a copy in training mode over two images and three; refuse what is more than dropout."""
    before = _digests(copied.named_parameters())
    run = partial(_run, copied, numpy_generators(copied))
    two, three = (run(probe[[0, 1, 0][:images]]) for images in (2, 3))
    if two.output.dim() != 2 or len(two.output) != 2 or not two.output.is_floating_point():
        raise UnsupportedModule(
            f"the module must map a batch of B images to logits [B, C]; two images gave "
            f"{two.output.dtype} {list(two.output.shape)}"
        )
    for name, digest in _digests(copied.named_parameters()).items():
        if digest != before.get(name):
            raise UnsupportedModule(
                f"in training mode a pass changes the parameter {name}: change it elsewhere"
            )
    if not torch.equal(run(probe).output, two.output):
        raise UnsupportedModule(
            "two passes in training mode over the same images, without dropout, differ: the module "
            "draws random numbers that no mask can replace, or changes its buffers"
        )
    try:
        _require_same(two.output, expected, _MORE_THAN_DROPOUT)
    except UnsupportedModule:
        # A mask of bernoulli_ that is not scaled: then all kept is what eval mode computes.
        _require_same(run(probe, all_kept=True).output, expected, _MORE_THAN_DROPOUT)
    return two, three


def _run(
    copied: nn.Module, generators: Sequence[NumPyGenerator], x: Tensor, *, all_kept: bool = False
) -> _Pass:
    """Run images through a copy in training mode without the noise of dropout.

    Masks of `bernoulli_` are their mean, or all ones if `all_kept`.
    """
    calls: list[_Call] = []
    uses: dict[str, int] = {}

    def note(law: Law, shape: torch.Size) -> Tensor | None:
        path, caller = randomness.running[-1]
        if (law.p or 0) >= 1:
            where = path or "the module"
            raise UnsupportedModule(f"{where}: dropout with p={law.p} drops everything")
        name = path or "root"
        if [*caller.children(), *caller.parameters()]:  # then it does more than drop
            name = f"{name}:{law.kind}"
        uses[name] = uses.get(name, 0) + 1
        if uses[name] > 1:
            name = f"{name}[{uses[name]}]"
        calls.append(_Call(name, law, shape))
        return torch.ones(shape, device=x.device) if all_kept and law.kind == "bernoulli" else None

    interception = Interception(note)
    with (
        torch.no_grad(),
        _RefuseRandomness(copied, generators) as randomness,
        unsupported_if_it_fails(
            "in training mode the module fails",
            "; let nothing but dropout depend on self.training",
        ),
    ):
        output = _logits(interception.run(copied, x), "training mode")
    return _Pass(output, calls, interception.sizes)


def _site(call: _Call, three: torch.Size) -> Site:
    two = call.shape
    grows = [d for d, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    rows = [two[d] // 2 for d in grows]
    if len(grows) > 1 or [(2 * r, 3 * r) for r in rows] != [(two[d], three[d]) for d in grows]:
        raise UnsupportedModule(
            f"{call.name}: cannot tell the batch in a mask of shape {list(two)} for two images "
            f"and {list(three)} for three"
        )
    dim, template, units = None, tuple(two), tuple(two[1:] if two[:1] == (1,) else two) or (1,)
    if grows:
        dim = grows[0]
        template = (*two[:dim], rows[0], *two[dim + 1 :])
        units = template if rows[0] > 1 else template[:dim] + template[dim + 1 :]
    while len(units) > 1 and units[-1] == 1:  # one number for all that these would count
        units = units[:-1]
    return Site(call.name, call.law, tuple(units), template, dim)


def _state(module: nn.Module) -> object:
    """Return what changes when a parameter, a buffer or a mode of a module does."""
    digests = _digests([*module.named_parameters(), *module.named_buffers()])
    return digests, [child.training for child in module.modules()]


def _digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, bytes]:
    rows = ((name, tensor.detach().cpu().contiguous().flatten()) for name, tensor in tensors)
    return {name: hashlib.sha256(row.view(torch.uint8).numpy().data).digest() for name, row in rows}


def _logits(output: object, mode: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    raise UnsupportedModule(
        f"the module must return one tensor of logits, not {type(output)} as in {mode}"
    )


def _require_same(got: Tensor, expected: Tensor, otherwise: str) -> None:
    try:
        require_close(got, expected)
    except AssertionError as error:
        raise UnsupportedModule(otherwise) from error


def require_close(got: Tensor, expected: Tensor) -> None:
    """Raise AssertionError if logits of two computations differ by more than rounding."""
    coarse = 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=max(1e-3, coarse), atol=max(1e-4, coarse))


class _RefuseRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's is untyped
    """Inside `with`, code of this thread that draws random numbers raises UnsupportedModule.

    PyTorch's operations that draw are tagged, and dropout that is intercepted runs none. Python's
    generators, of whatever instance, draw by functions in C, which a profile function sees. Of
    NumPy's the global one and `generators` are checked, from one module of the network to the next.
    `running` holds the names and modules whose forwards run, innermost last.
    """

    def __init__(self, module: nn.Module, generators: Sequence[NumPyGenerator]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.running = [("", module)]
        self._hooks = ExitStack()
        self._generators = generators
        self._drawn: list[UnsupportedModule] = []
        self._numpy = self._numpy_states()
        self._outer = sys.getprofile()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out a wrapper for `torch.compile`: its import takes a second and 30 MB."""
        return False

    def __enter__(self) -> Self:
        for name, child in self.running[0][1].named_modules():
            enter = child.register_forward_pre_hook(partial(self._enter_module, name))
            self._hooks.callback(enter.remove)
            leave = child.register_forward_hook(self._leave_module, always_call=True)
            self._hooks.callback(leave.remove)
        super().__enter__()  # type: ignore[no-untyped-call]  # likewise
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401  as for every context manager
        sys.setprofile(self._outer)
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # likewise
        self._hooks.close()
        if self._drawn:
            raise self._drawn[0]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever the operation returns
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]  # noqa: SLF001  no public name
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            rates = [given.get(name, 0.0) for name in ("dropout_p", "dropout") if name in names]
            if any(rates) or not rates:  # attention, say, without dropout draws nothing
                raise self._refusal(f"PyTorch's {func}")
        return func(*args, **kwargs)

    def _enter_module(self, name: str, child: nn.Module, _args: object) -> None:
        self._check_numpy()
        self.running.append((name, child))

    def _leave_module(self, *_: object) -> None:
        self._check_numpy()
        self.running.pop()

    def _check_numpy(self) -> None:
        states = self._numpy_states()
        if states != self._numpy:
            self._drawn.append(self._refusal("a generator of NumPy"))
        self._numpy = states

    def _numpy_states(self) -> list[object]:
        states: list[object] = [np.random.get_state(legacy=False)]
        for generator in self._generators:
            if isinstance(generator, np.random.RandomState):
                states.append(generator.get_state(legacy=False))
            else:
                states.append(generator.bit_generator.state)
        return [_comparable(state) for state in states]

    def _profile(self, frame: FrameType, event: str, function: object) -> None:
        if event != "c_call":
            return
        own = isinstance(getattr(function, "__self__", None), random.Random)
        if not own and function is not os.urandom:  # of SystemRandom, and the seed of new ones
            return
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_globals.get("__name__", "").startswith("torch._dynamo"):
                return  # PyTorch's compiler draws for itself
            caller = caller.f_back
        self._drawn.append(self._refusal("a generator of Python's random"))

    def _refusal(self, source: str) -> UnsupportedModule:
        return UnsupportedModule(
            f"{self.running[-1][0] or 'the module'}: draws from {source}, which no mask can "
            f"replace: use dropout (torch.nn or torch.nn.functional), or multiply by a mask that a "
            f"floating-point tensor draws by bernoulli_(keep_probability)"
        )


def _comparable(state: Any) -> object:  # noqa: ANN401  what a bit generator's state is made of
    if isinstance(state, dict):
        return [_comparable(part) for part in state.values()]
    return state.tobytes() if isinstance(state, np.ndarray) else state

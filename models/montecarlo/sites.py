"""Where a network drops units: found by running a copy in training mode, and watching."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from models.errors import NoDropout, UnsupportedModule
from models.montecarlo.interception import Interception, Kind
from models.montecarlo.training_copy import training_copy

_RESCALED = ("dropout", "spatial", "attention")
"""Kinds that divide what they keep by 1-p."""


@dataclass(frozen=True)
class Site:
    """One call of a dropout function in a forward pass.

    Attributes:
        name: the module it was called in; `:kind` follows where that is no dropout module, `[2]`
            where the same module drops a second time.
        kind: which dropout.
        p: probability of dropping a unit.
        shape: the units that one image's mask covers; for spatial kinds the channels.
        template: the mask's shape for a batch of one, as the call sees it.
        batch_dim: the dimension of `template` that grows with the batch; None if none does.
    """

    name: str
    kind: Kind
    p: float
    shape: tuple[int, ...]
    template: tuple[int, ...]
    batch_dim: int | None

    @property
    def units(self) -> int:
        """How many units are dropped or kept by one mask."""
        return torch.Size(self.template).numel()

    @property
    def survivor(self) -> float:
        """What a kept unit is multiplied by."""
        return 1 / (1 - self.p) if self.kind in _RESCALED else 1.0

    def at(self, p: float) -> "Site":
        """Return the site with another rate, and what is kept scaled to match.

        Alpha dropout and masks of `bernoulli_` keep their own: what follows them is worked out from
        the module's p.
        """
        return replace(self, p=p) if self.kind in (*_RESCALED, "vanilla") else self

    def fit(self, scale: Tensor, shape: torch.Size) -> Tensor | None:
        """Spread a mask `scale` [*template] over a call's `shape`; None if it does not fit.

        A batch dimension may hold several rows an image (attention folds its heads into it);
        the rows of one image lie together.
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
        return (
            scale.unsqueeze(dim).expand(*shape[:dim], images, *self.template[dim:]).reshape(shape)
        )


@dataclass(frozen=True)
class Survey:
    """What one look at a module found.

    Attributes:
        training_copy: of the module (`models.montecarlo.training_copy`).
        sites: its dropout calls, in the order of a forward pass.
        widest: elements in the widest result of one image that depends on masks.
        classes: columns of its output.
    """

    training_copy: nn.Module
    sites: tuple[Site, ...]
    widest: int
    classes: int


@dataclass
class _Call:
    name: str
    kind: Kind
    p: float
    shape: torch.Size


@dataclass
class _Trace:
    """What one pass did.

    Attributes:
        output: of the module.
        calls: of dropout functions, in order.
        widest: elements in the widest result that depends on masks.
        generator_user: the module that drew from Python's or NumPy's global generator, if one did.
    """

    output: Tensor
    calls: list[_Call]
    widest: int
    generator_user: str | None


def survey(module: nn.Module, probe: Tensor) -> Survey:
    """Copy a module into training mode, run the copy and note every dropout call.

    It runs two images and three: the dimension of a mask that differs between the two is its batch
    dimension, wherever the module put it. Without the noise of dropout it must compute what the
    module does in eval mode.

    Args:
        module: in eval mode.
        probe: two images [2, ...].

    Raises:
        NoDropout: it calls none.
        UnsupportedModule: it has a dropout that no mask can reach, other randomness, an output that
            is not logits [B, C], or another behaviour in training mode than dropout.
    """
    _refuse_unreachable(module)
    expected = _without_noise(module, probe)  # first: it makes the parameters of lazy modules
    copied = training_copy(module)
    buffers = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    two, three = (_trace(copied, probe[[0, 1, 0][:images]]) for images in (2, 3))
    output = two.output
    if output.dim() != 2 or output.shape[0] != 2 or not output.is_floating_point():
        raise UnsupportedModule(
            f"the module must map a batch of B images to logits [B, C]; two images gave "
            f"{output.dtype} {list(output.shape)}"
        )
    if (
        two.generator_user is not None and three.generator_user is not None
    ):  # twice: it was no other thread
        raise UnsupportedModule(
            _randomness(two.generator_user, "Python's or NumPy's global generator")
        )
    for name, buffer in copied.named_buffers():
        if name in buffers and not torch.equal(buffer, buffers[name]):
            raise UnsupportedModule(
                f"in training mode the module changes its buffer {name}, so that answers would "
                f"depend on earlier ones: change it outside of forward"
            )
    _require_same(output, expected)
    if not two.calls:
        raise NoDropout(
            "the module calls no dropout with p > 0, so every Monte Carlo sample would be the "
            "same: add dropout (models.dropout.InvertedDropout or torch.nn.Dropout) and train"
        )
    if [(c.name, c.kind, c.p) for c in two.calls] != [(c.name, c.kind, c.p) for c in three.calls]:
        raise UnsupportedModule("the module's dropout calls change with the size of the batch")
    pairs = zip(two.calls, three.calls, strict=True)
    sites = tuple(_site(call, other.shape) for call, other in pairs)
    widest = max(two.widest, *(call.shape.numel() for call in two.calls))
    return Survey(copied, sites, widest // 2, output.shape[1])


def _site(call: _Call, three: torch.Size) -> Site:
    two = call.shape
    grows = [d for d, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    rows = [two[d] // 2 for d in grows]
    if len(grows) > 1 or [(2 * r, 3 * r) for r in rows] != [(two[d], three[d]) for d in grows]:
        raise UnsupportedModule(
            f"{call.name}: cannot tell the batch in a mask of shape {list(two)} for two images "
            f"and {list(three)} for three"
        )
    if not grows:
        return Site(call.name, call.kind, call.p, tuple(two), tuple(two), None)
    dim = grows[0]
    template = (*two[:dim], rows[0], *two[dim + 1 :])
    units = template if rows[0] > 1 else template[:dim] + template[dim + 1 :]
    if call.kind in ("spatial", "feature_alpha"):
        units = units[:1]
    return Site(call.name, call.kind, call.p, tuple(units), template, dim)


def _trace(module: nn.Module, x: Tensor) -> _Trace:
    """Run images through a module without the noise of dropout, and watch."""
    calls: list[_Call] = []
    stack: list[tuple[str, nn.Module]] = [("", module)]
    uses: dict[str, int] = {}

    def note(kind: Kind, p: float, shape: torch.Size) -> None:
        path, caller = stack[-1]
        if p >= 1:
            raise UnsupportedModule(f"{path or 'the module'}: dropout with p={p} drops everything")
        name = path or "root"
        if not hasattr(caller, "p"):  # a function called in some other module's forward
            name = f"{name}:{kind}"
        uses[name] = uses.get(name, 0) + 1
        if uses[name] > 1:
            name = f"{name}[{uses[name]}]"
        calls.append(_Call(name, kind, p, shape))

    interception, generators = Interception(note), _GlobalGenerators()
    with (
        _current_module(module, stack, generators.look),
        torch.no_grad(),
        interception,
        _RefuseRandomness(stack),
    ):
        try:
            output = _run(module, x, "training mode")
        except UnsupportedModule:
            raise
        except Exception as error:  # somebody's own module may fail in any way
            raise UnsupportedModule(
                f"in training mode the module fails: {type(error).__name__}: {error}; let nothing "
                f"but dropout depend on self.training"
            ) from error
    return _Trace(output, calls, interception.widest, generators.user)


def _without_noise(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), Interception(lambda _kind, _p, _shape: None):
        return _run(module, x, "eval mode")


def _run(module: nn.Module, x: Tensor, mode: str) -> Tensor:
    output = module(x.clone())  # which it may overwrite
    if not isinstance(output, Tensor):
        raise UnsupportedModule(
            f"the module must return one tensor of logits, not {type(output)} as in {mode}"
        )
    return output


def _require_same(training: Tensor, evaluation: Tensor) -> None:
    """Refuse a module that does more in training mode than drop units."""
    try:
        require_close(training, evaluation)
    except AssertionError as error:
        raise UnsupportedModule(
            "with its dropout switched off, the module computes other logits in training mode than "
            "in eval mode: let nothing but dropout depend on self.training (no auxiliary heads, no "
            "statistics of the batch), and use the values that dropout and bernoulli_ return"
        ) from error


def require_close(got: Tensor, expected: Tensor) -> None:
    """Raise AssertionError if logits of two computations differ by more than rounding."""
    coarse = 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=max(1e-3, coarse), atol=max(1e-4, coarse))


def _randomness(where: str, source: str) -> str:
    return (
        f"{where or 'the module'}: draws from {source}, which no mask can replace: use dropout "
        f"(torch.nn or torch.nn.functional), or draw masks by Tensor.bernoulli_(keep_probability)"
    )


class _RefuseRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's is untyped
    """Refuses operations that draw random numbers; dropout that is intercepted draws none.

    Args:
        stack: the modules whose forward is running, by name, innermost last.
    """

    def __init__(self, stack: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._stack = stack

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever the operation returns
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            raise UnsupportedModule(_randomness(self._stack[-1][0], f"PyTorch's {func}"))
        return func(*args, **kwargs)


def _draws(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Say if an operation that can draw random numbers does: attention, say, without dropout."""
    names = [argument.name for argument in func._schema.arguments]  # noqa: SLF001  no public name
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    rates = [given.get(name, 0.0) for name in ("dropout_p", "dropout") if name in names]
    return any(rates) or not rates


class _GlobalGenerators:
    """Watches the generators of Python and NumPy.

    Attributes:
        user: the first module that drew from one.
    """

    def __init__(self) -> None:
        self._state = self._read()
        self.user: str | None = None

    def look(self, running: str) -> None:
        """Compare with the last look: who was running since has drawn, if anybody has."""
        state = self._read()
        if state != self._state and self.user is None:
            self.user = running
        self._state = state

    @staticmethod
    def _read() -> tuple[object, ...]:
        numpys = np.random.get_state(legacy=False)["state"]
        return random.getstate(), numpys["key"].tobytes(), numpys["pos"]


@contextmanager
def _current_module(
    module: nn.Module, stack: list[tuple[str, nn.Module]], look: Callable[[str], None]
) -> Iterator[None]:
    """Keep on `stack` the modules whose forward is running, innermost last.

    `look` is called at each change with the name of the one that ran until then.
    """

    def enter_module(name: str, child: nn.Module) -> None:
        look(stack[-1][0])
        stack.append((name, child))

    def leave_module() -> None:
        look(stack.pop()[0])

    with ExitStack() as hooks:
        for name, child in module.named_modules():
            enter = child.register_forward_pre_hook(
                lambda m, _args, name=name: enter_module(name, m)
            )
            leave = child.register_forward_hook(
                lambda _m, _args, _output: leave_module(), always_call=True
            )
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        yield


def _refuse_unreachable(module: nn.Module) -> None:
    """Refuse what would drop units out of our sight."""
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

"""Where a network drops units: found by running a copy in training mode, and watching."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dropserve.models.errors import NoDropout, UnsupportedModule, unsupported_if_it_fails
from dropserve.models.montecarlo.interception import Interception, Kind
from dropserve.models.montecarlo.randomness import (
    NumPyGenerator,
    RefuseRandomness,
    numpy_generators,
)
from dropserve.models.montecarlo.training_copy import share_parameters, training_copy

_RESCALED = ("dropout", "spatial", "attention")
"""Kinds that divide what they keep by 1-p."""


@dataclass(frozen=True)
class Site:
    """One call of a dropout function in a forward pass.

    Attributes:
        name: the module it was called in; `:kind` follows where that does more than drop, `[2]`
            where the same module drops a second time.
        kind: which dropout.
        p: probability of dropping a unit.
        shape: the units that one image's mask covers; for spatial kinds the channels.
        template: the mask's shape for a batch of one, as the call sees it.
        batch_dim: the dimension of `template` that grows with the batch; None if none does.
        images_inside: whether that dimension, where it holds several rows an image, counts the
            images within a row, and not the rows within an image.
    """

    name: str
    kind: Kind
    p: float
    shape: tuple[int, ...]
    template: tuple[int, ...]
    batch_dim: int | None
    images_inside: bool = False

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
class Survey:
    """What one look at a module found.

    Attributes:
        training_copy: of the module (`dropserve.models.montecarlo.training_copy`).
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
    """

    output: Tensor
    calls: list[_Call]
    widest: int


def trace(module: nn.Module, probe: Tensor) -> Survey:
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
    expected, dropouts = _eval_mode(module, probe)  # it makes the parameters of lazy modules
    before = _state(module)
    copied = training_copy(module)
    try:
        two, three = _traces(copied, probe, expected)
        share_parameters(copied, module)
        logits, now = _eval_mode(module, probe)
        _require_same(logits, expected, _MODULE_CHANGED)
        _require((now, _state(module)) == (dropouts, before), _MODULE_CHANGED)
    except UnsupportedModule:
        copied.eval()  # what its train() has changed outside of it, code of its eval() may undo
        raise
    if not two.calls:
        raise NoDropout(
            "the module calls no dropout with p > 0 in training mode, so every Monte Carlo sample "
            "would be the same: add dropout (models.dropout.InvertedDropout or torch.nn.Dropout) "
            "and train"
        )
    if [(c.name, c.kind, c.p) for c in two.calls] != [(c.name, c.kind, c.p) for c in three.calls]:
        raise UnsupportedModule(
            "the module's dropout calls change with the size of the batch, or from pass to pass"
        )
    pairs = zip(two.calls, three.calls, strict=True)
    sites = tuple(_site(call, other.shape) for call, other in pairs)
    widest = max(two.widest, *(call.shape.numel() for call in two.calls))
    return Survey(copied, sites, widest // 2, two.output.shape[1])


_MODULE_CHANGED = (
    "after a copy of the module ran in training mode, the module is another in eval mode: let "
    "train() and forward change nothing but attributes of the module"
)
_MORE_THAN_DROPOUT = (
    "with its dropout switched off, the module computes other logits in training mode than in "
    "eval mode: let nothing but dropout depend on self.training (no auxiliary heads, no statistics "
    "of the batch), and multiply by masks of bernoulli_ as floating-point numbers"
)
_NOT_REPEATED = (
    "two passes in training mode over the same images, without dropout, differ: the module draws "
    "random numbers that no mask can replace, or changes its buffers"
)


def _traces(copied: nn.Module, probe: Tensor, expected: Tensor) -> tuple[_Trace, _Trace]:
    """Run a copy in training mode over two images and three; refuse what is more than dropout."""
    before, generators = _digests(copied.named_parameters()), numpy_generators(copied)
    trace = partial(_trace, copied, generators)
    two, three = (trace(probe[[0, 1, 0][:images]]) for images in (2, 3))
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
    if not torch.equal(trace(probe).output, two.output):
        raise UnsupportedModule(_NOT_REPEATED)
    try:
        _require_same(two.output, expected, _MORE_THAN_DROPOUT)
    except UnsupportedModule:
        # A mask of bernoulli_ that is not scaled: then all kept is what eval mode computes.
        _require_same(trace(probe, all_kept=True).output, expected, _MORE_THAN_DROPOUT)
    return two, three


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


def _trace(
    copied: nn.Module, generators: Sequence[NumPyGenerator], x: Tensor, *, all_kept: bool = False
) -> _Trace:
    """Run images through a copy in training mode without the noise of dropout, and watch.

    Masks of `bernoulli_` are their mean, or all ones if `all_kept`.
    """
    calls: list[_Call] = []
    stack: list[tuple[str, nn.Module]] = [("", copied)]
    uses: dict[str, int] = {}

    def note(kind: Kind, p: float, shape: torch.Size) -> Tensor | None:
        path, caller = stack[-1]
        if p >= 1:
            raise UnsupportedModule(f"{path or 'the module'}: dropout with p={p} drops everything")
        name = path or "root"
        if [*caller.children(), *caller.parameters()]:  # then it does more than drop
            name = f"{name}:{kind}"
        uses[name] = uses.get(name, 0) + 1
        if uses[name] > 1:
            name = f"{name}[{uses[name]}]"
        calls.append(_Call(name, kind, p, shape))
        return torch.ones(shape, device=x.device) if all_kept and kind == "bernoulli" else None

    interception = Interception(note)
    randomness = RefuseRandomness(lambda: stack[-1][0], generators)
    with (
        _current_module(copied, stack, randomness.check_numpy),
        torch.no_grad(),
        randomness,
        unsupported_if_it_fails(
            "in training mode the module fails",
            "; let nothing but dropout depend on self.training",
        ),
    ):
        output = _logits(interception.run(copied, x), "training mode")
    return _Trace(output, calls, interception.widest)


def _state(module: nn.Module) -> object:
    """Return what changes when a parameter, a buffer or a mode of a module does."""
    digests = _digests([*module.named_parameters(), *module.named_buffers()])
    return digests, [child.training for child in module.modules()]


def _digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, bytes]:
    """Return the SHA-256 of each tensor's bytes."""
    return {name: hashlib.sha256(_bytes(tensor)).digest() for name, tensor in tensors}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _eval_mode(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Run a module in eval mode; switch off, and count, dropout that is on all the same."""
    kinds: list[Kind] = []
    interception = Interception(lambda kind, *_: kinds.append(kind), running_statistics=False)
    with torch.no_grad():
        return _logits(interception.run(module, x), "eval mode"), len(kinds)


def _logits(output: object, mode: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise UnsupportedModule(
            f"the module must return one tensor of logits, not {type(output)} as in {mode}"
        )
    return output


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnsupportedModule(otherwise)


def _require_same(got: Tensor, expected: Tensor, otherwise: str) -> None:
    try:
        require_close(got, expected)
    except AssertionError as error:
        raise UnsupportedModule(otherwise) from error


def require_close(got: Tensor, expected: Tensor) -> None:
    """Raise AssertionError if logits of two computations differ by more than rounding."""
    coarse = 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=max(1e-3, coarse), atol=max(1e-4, coarse))


@contextmanager
def _current_module(
    module: nn.Module, stack: list[tuple[str, nn.Module]], before_change: Callable[[], None]
) -> Iterator[None]:
    """Keep on `stack` the modules whose forward is running, innermost last."""

    def enter_module(name: str, child: nn.Module) -> None:
        before_change()
        stack.append((name, child))

    def leave_module() -> None:
        before_change()
        stack.pop()

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

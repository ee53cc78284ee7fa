"""Where a network drops units: found by running it once and watching."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.errors import NoDropout, UnsupportedModule
from models.montecarlo.interception import Interception, Kind


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
        return 1.0 if self.kind in ("vanilla", "alpha", "feature_alpha") else 1 / (1 - self.p)

    def at(self, p: float) -> "Site":
        """Return the site with another rate, and what is kept scaled to match.

        Alpha dropout keeps its own: the map that follows it is worked out from the module's p.
        """
        return self if self.kind in ("alpha", "feature_alpha") else replace(self, p=p)

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
        sites: its dropout calls, in the order of a forward pass.
        widest: elements in the widest result of one image that depends on masks.
        classes: columns of its output.
    """

    sites: tuple[Site, ...]
    widest: int
    classes: int


@dataclass
class _Call:
    name: str
    kind: Kind
    p: float
    shape: torch.Size


def survey(module: nn.Module, example: Tensor) -> Survey:
    """Run `module` in eval mode on `example` [B, ...] and note every dropout call.

    The first image is run as a batch of two and of three: the dimension of a mask that differs
    between the two is its batch dimension, wherever the module put it.

    Raises:
        NoDropout: it calls none.
        UnsupportedModule: it has a dropout that no mask can reach, or an output that is not logits
            [B, C].
    """
    _refuse_unreachable(module)
    calls, widest, output = _watch(module, example, images=2)
    other, _, _ = _watch(module, example, images=3)
    if output.dim() != 2 or output.shape[0] != 2 or not output.is_floating_point():
        raise UnsupportedModule(
            f"the module must map a batch of B images to logits [B, C]; two images gave "
            f"{output.dtype} {list(output.shape)}"
        )
    if not calls:
        raise NoDropout(
            "the module calls no dropout with p > 0, so every Monte Carlo sample would be the "
            "same: add dropout (models.dropout.InvertedDropout or torch.nn.Dropout) and train"
        )
    if [(c.name, c.kind, c.p) for c in calls] != [(c.name, c.kind, c.p) for c in other]:
        raise UnsupportedModule("the module's dropout calls change with the size of the batch")
    sites = tuple(_site(two, three.shape) for two, three in zip(calls, other, strict=True))
    widest = max(widest, *(call.shape.numel() for call in calls))
    return Survey(sites, widest // 2, output.shape[1])


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


def _watch(module: nn.Module, example: Tensor, images: int) -> tuple[list[_Call], int, Tensor]:
    """Run a batch of copies of the first image; return dropout calls, widest result, output."""
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

    watch = Interception(note)
    with _current_module(module, stack), torch.no_grad(), watch:
        output = module(example[:1].repeat(images, *(1 for _ in example.shape[1:])))
    if not isinstance(output, Tensor):
        raise UnsupportedModule(f"the module must return one tensor of logits, not {type(output)}")
    return calls, watch.widest, output


@contextmanager
def _current_module(module: nn.Module, stack: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep on `stack` the modules whose forward is running, innermost last."""
    with ExitStack() as hooks:
        for name, child in module.named_modules():
            enter = child.register_forward_pre_hook(
                lambda m, _args, name=name: stack.append((name, m))
            )
            leave = child.register_forward_hook(
                lambda _m, _args, _output: stack.pop() and None, always_call=True
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

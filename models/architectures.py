"""Networks that are no sequences of layers: recurrent, residual, and a transformer.

Each maps images [B, C, H, W] to logits [B, classes]. `noise()` makes a new layer of a stochastic
regularizer, or an identity.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropserve.models.regularizers import RecurrentDropConnect, Stochastic, StochasticDepth

Shape = tuple[int, int, int]
Noise = Callable[[], nn.Module]


class GRU(nn.Module):
    """Reads an image row by row, and classifies its last state.

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (EMNLP 2014), with the
    reset gate after the product, as in PyTorch's. Noise on the state is put into what the gates and
    the new values read, not into what is carried over. Weights are in the order reset, update, new.

    Attributes:
        inputs: noise on the rows [B, T, C * W].
        state: noise on the states [B, T, units].
        update: `Zoneout`, or an identity.
        from_input: a linear layer to 3 * units.
        from_state: likewise, or a `RecurrentDropConnect`.
    """

    def __init__(
        self,
        units: int,
        classes: int,
        *,
        inputs: nn.Module,
        state: nn.Module,
        update: nn.Module,
        from_input: nn.Module,
        from_state: nn.Module,
    ) -> None:
        super().__init__()
        self.units = units
        self.inputs, self.state, self.update = inputs, state, update
        self.from_input, self.from_state = from_input, from_state
        self.logits = nn.Linear(units, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        rows = self.inputs(images.transpose(1, 2).flatten(2))
        masks, shares = self._factors(self.state, rows), self._factors(self.update, rows)
        linear: Callable[[Tensor], Tensor] = self.from_state
        if isinstance(linear, RecurrentDropConnect):
            linear = linear(rows)
        h, gates = rows.new_zeros(len(rows), self.units), 2 * self.units
        for given, mask, share in zip(self.from_input(rows).unbind(1), masks, shares, strict=False):
            read = linear(h if mask is None else h * mask)
            reset, keep = (given[:, :gates] + read[:, :gates]).sigmoid().chunk(2, 1)
            new = torch.addcmul(given[:, gates:], reset, read[:, gates:]).tanh()
            new = new + keep * (h - new)  # in mixed precision too, which lerp refuses
            h = new if share is None else h + share * (new - h)
        logits: Tensor = self.logits(h)
        return logits

    def _factors(self, layer: nn.Module, rows: Tensor) -> Iterable[Tensor | None]:
        """Return what a layer multiplies the state by at each step: [B, units], None for one."""
        if not isinstance(layer, Stochastic):
            return repeat(None)
        factors: Tensor = layer(rows.new_ones(()).expand(*rows.shape[:2], self.units))
        return factors.unbind(1)


def residual_blocks(
    inputs: int, channels: Sequence[int], noise: Noise, depth: Sequence[float]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the convolutions of a wide residual network, noise inside its blocks.

    Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016). `channels` has an entry a stage;
    each but the first halves the image. `depth` has the rate of stochastic depth of each block.
    """
    width = channels[0]
    yield "conv", nn.Conv2d(inputs, width, 3, padding=1, bias=False)
    for i, rate in enumerate(depth):
        stage, block = divmod(i, len(depth) // len(channels))
        stride = 2 if stage and not block else 1
        yield f"block{i + 1}", _Block(width, channels[stage], stride, noise(), rate)
        width = channels[stage]
    yield "norm", nn.BatchNorm2d(width)
    yield "relu", nn.ReLU()


class _Block(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, stride: int, noise: nn.Module, depth: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.noise = noise
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.depth = StochasticDepth(depth)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        branch = self.conv2(self.noise(F.relu(self.norm2(self.conv1(h)))))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        y: Tensor = shortcut + self.depth(branch)
        return y


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al., ICLR 2021), its tokens averaged at the end.

    `patch` is a patch's side. Noise follows the embedding, the attention, and both layers of each
    MLP, which is twice as wide as the tokens; normalisation comes first in each of the blocks.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        width: int,
        patch: int,
        noise: Noise,
        depth: Sequence[float],
    ) -> None:
        super().__init__()
        channels, *size = shape
        tokens = (size[0] // patch) * (size[1] // patch)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.noise = noise()
        self.blocks = nn.Sequential(*(_TransformerBlock(width, noise, rate) for rate in depth))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.logits(self.norm(self.blocks(self.noise(tokens))).mean(1))
        return logits


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, noise: Noise, depth: float) -> None:
        super().__init__()
        self.heads = gcd(width, max(1, width // 32))
        self.norm1 = nn.LayerNorm(width)
        self.from_tokens = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.noise = noise()
        self.depth1 = StochasticDepth(depth)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), noise(), nn.Linear(2 * width, width), noise()
        )
        self.depth2 = StochasticDepth(depth)

    def forward(self, x: Tensor) -> Tensor:
        made = self.from_tokens(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = made.transpose(1, 3).unbind(2)  # [B, heads, N, width / heads]
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.depth1(self.noise(self.attended(attended)))
        y: Tensor = x + self.depth2(self.mlp(self.norm2(x)))
        return y

"""Dropout as textbooks write it, in NumPy: what our layers and autograd are tested against.

A network of two hidden layers of ReLU, whose units are dropped, and logits with softmax
cross-entropy. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from
Overfitting", JMLR 15 (2014), sections 4, 5.1 and 10; there `p` is the probability of keeping a
unit, here of dropping it. docs/reference.md quotes functions of this module.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Layer = tuple[Array, Array]
"""Weights [in, out] and biases [out], or the gradients by them."""
Dropout = Callable[[Array, float, Array | None], Array]
"""`vanilla` or `inverted`: `(h, p, mask) -> h` with units dropped; a mask of None: eval mode."""


def draw_mask(random: np.random.Generator, shape: Sequence[int], p: float) -> Array:
    """Draw 0 with probability p, and 1 for a unit that is kept."""
    return (random.random(shape) >= p).astype(np.float64)


def vanilla(h: Array, p: float, mask: Array | None) -> Array:
    """Drop units [B, units] by a mask in training; in eval mode scale all of them."""
    return h * (1 - p) if mask is None else h * mask


def inverted(h: Array, p: float, mask: Array | None) -> Array:
    """Drop units [B, units] by a mask in training and scale the others; eval mode has all."""
    return h if mask is None else h * mask / (1 - p)


def forward(
    x: Array,
    layers: Sequence[Layer],
    dropout: Dropout,
    rates: Sequence[float],
    masks: Sequence[Array | None] = (None, None),
) -> tuple[Array, list[Array]]:
    """Map x [B, in] to logits [B, classes]; return what each of the three layers read, too."""
    read = [x]
    for (w, b), p, mask in zip(layers[:-1], rates, masks, strict=True):
        h = np.maximum(read[-1] @ w + b, 0)
        read.append(dropout(h, p, mask))
    w, b = layers[-1]
    return read[-1] @ w + b, read


def backward(
    logits: Array,
    labels: npt.NDArray[np.int64],
    read: Sequence[Array],
    layers: Sequence[Layer],
    dropout: Dropout,
    rates: Sequence[float],
    masks: Sequence[Array | None] = (None, None),
) -> tuple[float, list[Layer]]:
    """Return the mean cross-entropy of labels [B], and its gradients by each layer.

    `logits` and `read` are what `forward` returned with the same masks.
    """
    rows = np.arange(len(labels))
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = float(-log_p[rows, labels].mean())
    d = np.exp(log_p)
    d[rows, labels] -= 1
    d /= len(labels)
    gradients: list[Layer] = []
    for i in range(len(layers) - 1, -1, -1):
        gradients.insert(0, (read[i].T @ d, d.sum(0)))
        if i:
            w, _ = layers[i]
            d = dropout(d @ w.T, rates[i - 1], masks[i - 1])  # linear: the gradient has its factors
            d = d * (read[i] > 0)  # of ReLU: what is dropped has none in any case
    return loss, gradients

"""Which units are dropped, and normal numbers: a pure function of (seed, site, sample).

Bits come from Philox-4x64, a counter-based generator (Salmon, Moraes, Dror and Shaw, "Parallel
Random Numbers: As Easy as 1, 2, 3", SC 2011): the key is (seed, site), the counter says which
sample. So a mask depends on nothing else: not on how many samples are asked for, not on the batch.

`independent` masks drop each unit of each sample on its own. `stratified` masks are a Latin
hypercube (McKay, Beckman and Conover, 1979) in blocks of ten samples: a unit's ten uniform draws
fall one into each tenth of [0, 1), in an order of its own, and it is dropped where its draw is
below p. Each sample alone still drops each unit with probability exactly p, independently of the
other units; but within a block a unit is dropped 10p times, to rounding, so the average over the
block has a lower variance, as far as units act independently. Blocks are independent
of each other, so that the spread of their means says how far off the mean of all is. Normal numbers
are the same uniform draws through the inverse normal CDF.
"""

from itertools import combinations
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch

from dropserve.models.defaults import MaskKind

MASK_KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
BLOCK = 10
"""Samples in a block of stratified masks."""

Keep = npt.NDArray[np.bool_]
_WORDS = 4  # Philox-4x64 makes four 64-bit words a count
_BITS = (1 << np.arange(BLOCK, dtype=np.uint16))[:, None]
_SUBSETS = tuple(  # for each size 0 to 10, all subsets of ten samples of that size, as bits
    np.array([sum(1 << i for i in c) for c in combinations(range(BLOCK), size)], np.uint16)
    for size in range(BLOCK + 1)
)


def draw(kind: MaskKind, seed: int, site: int, units: int, p: float, samples: range) -> Keep:
    """Draw the masks of one dropout site: [len(samples), units], True where a unit is kept.

    `site` is its position in the network, `p` the probability of dropping a unit; the seed is 0 to
    2^63-1, and the range has step 1.
    """
    if kind == "independent":  # thirty-two bits decide a unit, so p is met to 2^-33
        words = _words(seed, site, samples, (units + 1) // 2)
        independent: Keep = words.view(np.uint32)[:, :units] >= round(p * 2**32)
        return independent
    # The Latin hypercube drops floor(10p) of the ten, or one more: the tenth that p falls into
    # holds one draw, which is below p with probability 10p - floor(10p). Given the count, every
    # subset of that size is equally likely. So one word decides a block's ten masks of a unit: its
    # upper half the count, its lower half the subset, from a table.
    blocks = range(samples.start // BLOCK, -(-samples.stop // BLOCK))
    words = _words(seed, site, blocks, units)[:, :units]
    subset = words & np.uint64(0xFFFFFFFF)
    size, share = divmod(p * BLOCK, 1)
    dropped = _choose(int(size), subset)
    if threshold := round(share * 2**32):
        one_more = (words >> np.uint64(32)) < np.uint64(threshold)
        dropped = np.where(one_more, _choose(int(size) + 1, subset), dropped)
    keep = (dropped[:, None, :] & _BITS) == 0  # [blocks, 10, units]
    offset = samples.start - blocks.start * BLOCK
    stratified: Keep = keep.reshape(-1, units)[offset : offset + len(samples)]
    return stratified


def draw_normal(
    kind: MaskKind, seed: int, site: int, units: int, samples: range
) -> npt.NDArray[np.float32]:
    """Draw standard normal numbers [len(samples), units], as `draw` draws masks."""
    blocks = range(samples.start // BLOCK, -(-samples.stop // BLOCK))
    rows = range(blocks.start * BLOCK, blocks.stop * BLOCK)
    words = _words(seed, site, rows, units)[:, :units]
    uniform = ((words & np.uint64(0xFFFFFFFF)) + 0.5) * 2.0**-32
    if kind == "stratified":  # the upper halves say which tenth: by their order in the block
        keys = (words >> np.uint64(32)).astype(np.uint32).reshape(-1, BLOCK, units)
        tenth = np.zeros(keys.shape, np.uint8)
        for i, j in combinations(range(BLOCK), 2):  # a tenth of the time of sorting strided keys
            below = keys[:, i] < keys[:, j]
            tenth[:, j] += below
            tenth[:, i] += ~below
        uniform = (tenth.reshape(-1, units) + uniform) / BLOCK
    offset = samples.start - rows.start
    wanted = torch.from_numpy(uniform[offset : offset + len(samples)])
    normal: npt.NDArray[np.float32] = torch.special.ndtri(wanted).float().numpy()
    return normal


def _choose(size: int, draws: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint16]:
    """Turn 32-bit draws into subsets of ten samples, all of one size, equally likely."""
    table = _SUBSETS[size]
    return table.take(((draws * np.uint64(len(table))) >> np.uint64(32)).view(np.int64))


def _words(seed: int, site: int, rows: range, width: int) -> npt.NDArray[np.uint64]:
    """Draw rows of the site's table of 64-bit words, at least `width` wide.

    Rows are padded to whole Philox counts, so row r is always the same words.
    """
    counts = (width + _WORDS - 1) // _WORDS
    generator = np.random.Philox(key=np.array([seed, site], np.uint64))
    generator.advance(rows.start * counts)
    raw: npt.NDArray[np.uint64] = generator.random_raw(len(rows) * counts * _WORDS)
    return raw.reshape(len(rows), counts * _WORDS)

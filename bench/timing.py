"""Times T Monte Carlo samples by plain loops and by ours, the contenders taking turns.

So a change in the machine's speed meets all of them, and ratios of medians hold where times do not.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench.networks import Network, with_dropout
from bench.progress import follow
from dropserve.models.montecarlo import Sampler
from dropserve.models.sequential import compile_for_inference, convert_memory_format

Call = Callable[[], Tensor]
_TURN = 0.05
"""Seconds of a turn: shorter calls are repeated to fill it, so that each finds its caches warm."""
_CHANCE, _RARE = 2, 1e-3
"""Contenders may differ by twice what chance gives; on one image by twice that, and a thousandth:
where a network is sure, the samples that say otherwise are too rare to tell chance's size from."""

CONTENDERS = {
    "eval_pytorch": "one prediction in eval mode, the module as PyTorch makes it",
    "eval": "one prediction in eval mode, as the service runs it",
    "loop": "T passes with nn.Dropout in train mode",
    "loop_laid_out": "the same, with our module's memory layout",
    "fold": "one pass over a batch of T times the images",
    "ours": "Sampler.sample(...).mean(0): what the loop computes",
    "ours_new_seed": "the same with a new seed: masks drawn and weights gathered within the time",
    "ours_summary": "Sampler.summarize(...): all statistics",
}


def contenders(module: nn.Module, x: Tensor, samples: int) -> dict[str, Call]:
    """Return name -> a call that answers the batch `x` [B, ...] once; see `CONTENDERS`."""
    ours = convert_memory_format(copy.deepcopy(module))
    sampler = Sampler(ours, x)
    sampler.warm_up(x[:1])  # as the service does
    streamlined = compile_for_inference(ours, x)
    noisy, laid_out = with_dropout(module), convert_memory_format(with_dropout(module))
    seeds = itertools.count(1)  # the default, 0, was drawn and gathered by warm_up
    return {
        "eval_pytorch": lambda: module(x).softmax(-1),
        "eval": lambda: streamlined(x).softmax(-1),
        "loop": lambda: _loop(noisy, x, samples),
        "loop_laid_out": lambda: _loop(laid_out, x, samples),
        "fold": lambda: _fold(noisy, x, samples),
        "ours": lambda: sampler.sample(x, samples).mean(0),
        "ours_new_seed": lambda: sampler.sample(x, samples, next(seeds)).mean(0),
        "ours_summary": lambda: sampler.summarize(x, samples).mean,
    }


def _loop(module: nn.Module, x: Tensor, samples: int) -> Tensor:
    return passes(module, x, range(samples)).mean(0)


def passes(module: nn.Module, x: Tensor, samples: Iterable[object]) -> Tensor:
    """Run a module in train mode once for each of `samples`: probabilities [T, B, C]."""
    return torch.stack([module(x).softmax(-1) for _ in samples])


def _fold(module: nn.Module, x: Tensor, samples: int) -> Tensor:
    rows: Tensor = module(x.repeat(samples, *(1 for _ in x.shape[1:]))).softmax(-1)
    return rows.view(samples, len(x), -1).mean(0)


def row(
    network: Network, module: nn.Module, x: Tensor, samples: int, rounds: int
) -> dict[str, Any]:
    """Measure one network at one batch size, and a fifth of the samples: as good if stratified."""
    calls = contenders(module, x, samples)
    gap, chance = compare(calls, with_dropout(module), x, samples)
    fewer = contenders(module, x, samples // 5)
    calls |= {f"{name}_fifth": fewer[name] for name in ("ours", "ours_summary")}
    times = measure(calls, rounds, f"{network.title}, batch {len(x)}")
    return {
        "network": network.name,
        "title": network.title,
        "trained": network.trained,
        "batch": len(x),
        "samples": samples,
        "gap": gap,
        "chance": chance,
        "path": Sampler(module, x).path,
        "microseconds": times,
        "ratios": {
            **{f"{name}/ours": times[name] / times["ours"] for name in ("loop", "fold")},
            "loop_laid_out/ours": times["loop_laid_out"] / times["ours"],
            "loop/ours_new_seed": times["loop"] / times["ours_new_seed"],
            "ours_new_seed/ours": times["ours_new_seed"] / times["ours"],
            "loop/ours_summary": times["loop"] / times["ours_summary"],
            "loop/ours_fifth": times["loop"] / times["ours_fifth"],
            "ours/eval": times["ours"] / times["eval"],
            "ours_summary/eval": times["ours_summary"] / times["eval"],
        },
    }


def compare(
    calls: Mapping[str, Call], noisy: nn.Module, x: Tensor, samples: int
) -> tuple[float, float]:
    """Return the RMS between the loop's means and ours, and what chance alone would make of it.

    Args:
        calls: the contenders.
        noisy: the module with dropout on, whose passes say how far samples lie apart.
        x: the batch [B, ...].
        samples: T.

    Raises:
        RuntimeError: they do not measure the same.
    """
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)  # the same verdict each time
        variance = float(passes(noisy, x, range(samples)).var(0).mean())
        loop, *others = (calls[n]() for n in ("loop", "fold", "ours", "ours_new_seed"))
    chance = (2 * variance / samples) ** 0.5
    fold, ours, new_seed = (float((o - loop).square().mean().sqrt()) for o in others)
    most = _CHANCE * chance * (1 + 1 / len(x)) + _RARE / len(x)
    if chance == 0 or max(fold, ours, new_seed) > most:
        raise RuntimeError(f"contenders disagree by {fold}, {ours}, {new_seed}; chance: {chance}")
    return ours, chance


def sweep(
    network: Network, module: nn.Module, x: Tensor, sizes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Measure the loop and ours for several T."""
    rows = []
    for samples in sizes:
        calls = contenders(module, x, samples)
        few = {name: calls[name] for name in ("eval", "loop", "ours", "ours_summary")}
        times = measure(few, rounds, f"{network.title}, batch {len(x)}, T={samples}")
        about = {"network": network.name, "batch": len(x), "samples": samples}
        rows.append({**about, "microseconds": times, "loop/ours": times["loop"] / times["ours"]})
    return rows


def measure(calls: Mapping[str, Call], rounds: int, title: str) -> dict[str, float]:
    """Return name -> median microseconds of a call; a first turn warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    with torch.inference_mode():
        for turn in follow(range(rounds + 1), title):
            for name, call in calls.items():
                seconds = _time(call, repeats[name])
                if turn:
                    times[name].append(seconds * 1e6)
                elif seconds < _TURN:
                    repeats[name] = max(1, round(_TURN / _time(call, 1)))
    return {name: statistics.median(values) for name, values in times.items()}


def _time(call: Call, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        if call().is_cuda:
            torch.cuda.synchronize()  # as a request waits for its answer
    return (time.perf_counter() - started) / repeats


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what `row` measured: milliseconds and ratios."""
    names = ("eval", "loop", "loop_laid_out", "fold", "ours", "ours_new_seed", "ours_summary")
    heads = ("eval ms", "loop", "laid out", "T-fold", "ours", "new seed", "statistics")
    shown = Table("network", "batch", *heads, "loop/ours", "laid out/ours", "ours/eval", "path")
    for r in rows:
        figures = [f"{r['microseconds'][name] / 1e3:,.2f}" for name in names]
        ratios = [r["ratios"][k] for k in ("loop/ours", "loop_laid_out/ours", "ours/eval")]
        figures += [f"{ratio:.1f}x" for ratio in ratios]
        shown.add_row(r["network"], str(r["batch"]), *figures, r["path"])
    return shown


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what `sweep` measured."""
    shown = Table("network", "batch", "T", "loop ms", "ours", "with statistics", "loop/ours")
    for r in rows:
        times = [r["microseconds"][name] / 1e3 for name in ("loop", "ours", "ours_summary")]
        figures = [f"{ms:,.2f}" for ms in times]
        shown.add_row(
            *map(str, (r["network"], r["batch"], r["samples"])), *figures, f"{r['loop/ours']:.1f}x"
        )
    return shown

"""What the documentation claims of the engine, held against what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from bench.efficiency import find

LOOP = {("mlp", 1): 45, ("mlp", 64): 20, ("cnn", 1): 50, ("cnn", 32): 70}
"""Least speed-up over the loop, by network and batch."""

UNIVERSAL = 8
EQUAL_ERROR = 100
MEMORY_MIB = 600
STANDARD_ERROR = 0.15
TRAINING = 1


@dataclass(frozen=True)
class Claim:
    """A figure and its target.

    Attributes:
        text: what is claimed.
        measured: the figure.
        relation: which side of the target is right.
        target: the bound.
        unit: of both.
    """

    text: str
    measured: float
    relation: Literal[">=", "<="]
    target: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Say if it holds."""
        if self.relation == ">=":
            return self.measured >= self.target
        return self.measured <= self.target

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "met": self.met}


def claims(result: Mapping[str, Any]) -> list[Claim]:
    """Hold the claims against `engine.json`, as far as it was measured."""
    found = [*_speed(result.get("engine", [])), *_equal_error(result)]
    for study in result.get("efficiency", []):
        found += _efficiency(study, result["samples"])
    for r in result.get("noises", []):
        if r["network"] == "mlp":
            text = f"MLP with {r['method']}, batch {r['batch']}: ours over the loop"
            found.append(Claim(text, r["loop/ours"], ">=", UNIVERSAL, "x"))
    for r in result.get("training", []):
        text = f"{r['title']}: training, fit over the faster DataLoader loop"
        ratio = min(r["fit/dataloader"], r["fit/dataloader_batches"])
        found.append(Claim(text, ratio, ">=", TRAINING, "x"))
    for r in result.get("memory", []):
        if "ours_summary" in r["mib"] and r["samples"] >= 1000:
            text = f"{r['title']}: memory of T={r['samples']:,}, batch {r['batch']}, above idle"
            found.append(Claim(text, r["mib"]["ours_summary"], "<=", MEMORY_MIB, " MiB"))
    return found


def _speed(rows: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    for r in rows:
        target = LOOP.get((r["network"], r["batch"]), UNIVERSAL)
        text = f"{r['title']}, batch {r['batch']}: faster than the loop of T={r['samples']}"
        yield Claim(text, r["ratios"]["loop/ours"], ">=", target, "x")


def _equal_error(result: Mapping[str, Any]) -> Iterator[Claim]:
    studied = {study["network"] for study in result.get("efficiency", [])}
    for r in result.get("engine", []):
        if r["network"] in studied:
            text = f"{r['title']}, batch {r['batch']}: faster at equal RMSE of the mean"
            yield Claim(text, r["ratios"]["loop/ours_fifth"], ">=", EQUAL_ERROR, "x")


def _efficiency(study: Mapping[str, Any], samples: int) -> Iterator[Claim]:
    title, few = study["title"], samples // 5
    loop = find(study, "independent", samples)
    ours = find(study, "stratified", few)
    text = f"{title}: RMSE of the mean, stratified T={few} over independent T={samples}"
    yield Claim(text, ours["rmse"]["mean"] / loop["rmse"]["mean"], "<=", 1)
    for kind in ("independent", "stratified"):
        ratio = find(study, kind, samples)["reported/true"]
        text = f"{title}: standard_error off the true RMSE, {kind}, T={samples}"
        yield Claim(text, abs(ratio - 1), "<=", STANDARD_ERROR)


def table(found: Sequence[Claim]) -> Table:
    """Show target, measured, met."""
    shown = Table("claim", "target", "measured", "met")
    for claim in found:
        target = f"{claim.relation} {claim.target:g}{claim.unit}"
        met = "[green]yes" if claim.met else "[red]no"
        shown.add_row(claim.text, target, f"{claim.measured:,.3g}{claim.unit}", met)
    return shown

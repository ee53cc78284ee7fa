"""Measures them all: `python -m bench.http`; writes bench/results/http.json.

A round asks every server in turn, one running at a time: it is started, its answers are compared
with the network's own, it is warmed up, then wrk loads it at each number of connections. The
figures are medians over the rounds, so that a change in the machine's speed meets all of them.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.http import load, reference
from bench.http.processes import free_port, serving
from bench.http.servers import NEW_SEED, PEERS, SAMPLES, SERVERS, Server
from dropserve.lab.machine import machine

RESULTS = Path(__file__).parent.parent / "results" / "http.json"


class Bench:
    """All rounds of all servers."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        data_dir = reference.default_data_dir()
        trained = reference.find_or_train(options.checkpoints, data_dir)
        self.checkpoint = reference.alone(trained, folder / "checkpoints")
        candidates = reference.pictures(data_dir)
        self.pictures = candidates[: reference.PICTURES]
        self.questions = reference.unsure(self.checkpoint, candidates)
        self.expected = reference.expected(self.checkpoint, self.questions, SAMPLES)
        self.rounds: dict[str, dict[int, list[load.Load]]] = {}
        self.starts: dict[str, list[float]] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.failed: dict[str, str] = {}

    def run(self, servers: Sequence[Server], console: Console) -> Iterator[list[dict[str, Any]]]:
        """Make the environments, then measure, showing where it is; yield the rows so far."""
        columns = [SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn()]
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as shown:
            task = shown.add_task("", total=len(servers) * (self.options.rounds + 1))
            for server in servers:
                shown.update(task, description=f"installing {server.name}")
                self._install(server)
                shown.advance(task)
            for turn in range(self.options.rounds):
                for server in servers:
                    shown.update(task, description=f"round {turn + 1}: {server.name}")
                    if server.name not in self.failed:
                        self._measure(server)
                    shown.advance(task)
                yield [self._row(server) for server in servers]

    def _install(self, server: Server) -> None:
        try:
            if server.environment is None:
                packages = {p: version(p) for p in ("torch", *server.packages)}
                self.versions[server.name] = {"python": platform.python_version(), **packages}
            else:
                server.environment.make()
                self.versions[server.name] = server.environment.versions(server.packages)
        except Exception as error:  # whatever it is, the others go on
            self.failed[server.name] = f"not installed: {_one_line(error)}"

    def _measure(self, server: Server) -> None:
        """Start, check, warm up and load one server; what goes wrong is its row's failure."""
        port = free_port()
        url = f"http://127.0.0.1:{port}{server.path}"
        with tempfile.TemporaryDirectory(dir=self.folder) as name, httpx.Client(timeout=10) as http:
            folder = Path(name)
            bodies = folder / "bodies"
            bodies.mkdir()
            for i, png in enumerate(self.pictures):
                (bodies / str(i)).write_bytes(server.body.wrap(png))

            def ask(i: int) -> httpx.Response:
                content = server.body.wrap(self.questions[i])
                headers = {"Content-Type": server.body.content_type}
                return http.post(url.replace(NEW_SEED, str(i)), content=content, headers=headers)

            def answers() -> bool:
                try:
                    return ask(0).is_success
                except httpx.TransportError:
                    return False

            try:
                bin_folder = server.environment.python.parent if server.environment else _OWN_BIN
                command = server.command(str(bin_folder), port)
                with serving(command, self._variables(server), folder, answers) as seconds:
                    _check(server, self.expected, map(ask, range(len(self.questions))))
                    self.starts.setdefault(server.name, []).append(seconds)
                    self._load(server, url, bodies)
            except Exception as error:  # whatever it is, the others go on
                self.failed[server.name] = _one_line(error)

    def _load(self, server: Server, url: str, bodies: Path) -> None:
        rounds = self.rounds.setdefault(server.name, {})
        for connections in self.options.connections:
            target = (url, bodies, server.body.content_type, connections)
            warm = load.run(*target, self.options.warmup)
            # what wrk left unanswered is worked off in about the time that answers took
            time.sleep(0.2 + warm.p99_us / 1e6)
            rounds.setdefault(connections, []).append(load.run(*target, self.options.seconds))

    def _variables(self, server: Server) -> dict[str, str]:
        return {
            "PATH": f"{server.environment.python.parent}:{os.environ['PATH']}"
            if server.environment
            else os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PEERS) if server.environment else "",
            "BENCH_CHECKPOINT": str(self.checkpoint),
            "DROPSERVE_CHECKPOINTS": str(self.checkpoint.parent.parent),
            **server.variables,
        }

    def _row(self, server: Server) -> dict[str, Any]:
        """Return what is told of a server."""
        about = {"name": server.name, "label": server.label, "task": server.task}
        row: dict[str, Any] = {**about, "versions": self.versions.get(server.name, {})}
        if server.body.note:
            row["note"] = server.body.note
        if server.name in self.failed:
            return {**row, "failed": self.failed[server.name]}
        row["start_seconds"] = round(statistics.median(self.starts[server.name]), 1)
        row["loads"] = []
        for connections, loads in self.rounds[server.name].items():
            figures = [got.to_json() for got in loads]
            medians = {k: statistics.median(f[k] for f in figures) for k in figures[0]}
            medians["errors"] = sum(f["errors"] for f in figures)
            row["loads"].append({"connections": connections, **medians, "rounds": figures})
        if any(figures["errors"] for figures in row["loads"]):
            row["failed"] = "some requests were refused or broken off"
        return row


_OWN_BIN = Path(sys.executable).parent


def _check(
    server: Server, expected: reference.Expected, responses: Iterable[httpx.Response]
) -> None:
    answers = [response.raise_for_status().json() for response in responses]
    got = np.array([server.probabilities(answer) for answer in answers])
    if server.task == "predict":
        expected.check_predictions(got)
    else:
        expected.check_samples(got, np.array([server.variance(answer) for answer in answers]))


def _one_line(error: Exception) -> str:
    said = getattr(error, "stderr", None) or error  # a command's last words say more than its code
    return " ".join(f"{type(error).__name__}: {said}".split())[-500:]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Show the rows."""
    shown = Table("task", "server", "clients", "requests/s", "p50 ms", "p99 ms", "errors")
    for row in rows:
        if "loads" not in row:
            shown.add_row(row["task"], row["label"], row["failed"][:80])
        for got in row.get("loads", []):
            figures = [f"{got[k]:,.2f}" for k in ("requests_per_second", "p50_ms", "p99_ms")]
            shown.add_row(
                row["task"], row["label"], str(got["connections"]), *figures, str(got["errors"])
            )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON after each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [server.name for server in SERVERS]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--warmup", type=float, default=2, help="seconds before each load")
    parser.add_argument(
        "--connections", default="1,32", type=lambda s: [int(c) for c in s.split(",")]
    )
    parser.add_argument("--only", default=names, type=lambda s: s.split(","), help=",".join(names))
    parser.add_argument("--checkpoints", type=Path, help=f"folder with {reference.NAME}")
    parser.add_argument("--json", type=Path, help="file of results, by default bench/results")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(names):
        parser.error(f"no such server: {', '.join(sorted(unknown))}")
    if options.json is None and set(options.only) < set(names):
        parser.error("a part would overwrite the results of the whole: name a file with --json")
    target: Path = options.json or RESULTS
    target.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended then too
    try:
        wrk = load.wrk_version()
    except load.WrkMissing as error:
        raise SystemExit(str(error)) from error
    servers = [server for server in SERVERS if server.name in options.only]
    console = Console()
    with tempfile.TemporaryDirectory(prefix="dropserve-bench-") as folder:
        bench = Bench(options, Path(folder))
        settings = {
            "seconds": options.seconds,
            "warmup": options.warmup,
            "connections": options.connections,
            "wrk": wrk,
            "model": bench.checkpoint.parent.name,
            "samples": SAMPLES,
        }
        date, on = datetime.now(UTC).date().isoformat(), machine()
        rows: list[dict[str, Any]] = []
        for done, rows in enumerate(bench.run(servers, console), 1):
            result = {
                "date": date,
                "machine": on,
                "settings": {**settings, "rounds": done},
                "rows": rows,
            }
            target.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table(rows))


if __name__ == "__main__":
    main()

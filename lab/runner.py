"""Runs an experiment: every setting with every seed, in processes; what is done is kept.

A run is one file, written when it ends, so that an interrupted experiment goes on with the next
one. Each process computes with one thread, as small networks are trained (docs/training.md).
"""

import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from dropserve.lab import experiments, measures, run
from dropserve.lab.experiment import Experiment, Setting
from dropserve.lab.machine import machine, versions
from dropserve.lab.results import Document, with_estimates, write_document
from dropserve.models import storage

QUICK_SEEDS = 2
_DIGITS = 6


@dataclass(frozen=True)
class Options:
    """How experiments are run; `folder` is where results go, `checkpoints` where versions go."""

    folder: Path
    data_dir: Path
    checkpoints: Path
    seeds: int | None = None  # None: as the experiment says
    quick: bool = False
    processes: int = os.cpu_count() or 1


@dataclass(frozen=True)
class Task:
    """One run, and the file that it is kept in."""

    name: str
    index: int  # of the setting
    seed: int
    options: Options
    file: Path


def _tasks(name: str, experiment: Experiment, options: Options) -> list[Task]:
    """List all runs; one of another declaration, or measured in another way, is another file."""
    seeds = options.seeds or (QUICK_SEEDS if options.quick else experiment.seeds)
    code = [experiments.source(name), *map(inspect.getsource, (measures, run))]
    files = []
    for setting in experiment.settings:
        declared = repr((_describe(experiment, setting), options.quick, code, versions()))
        digest = hashlib.sha256(declared.encode()).hexdigest()[:12]
        files.append((slug(setting.label), digest))
    folder = kept_runs(options.folder, name)
    return [
        Task(name, index, seed, options, folder / f"{label}-{seed}-{digest}.json")
        for seed in range(seeds)  # runs of one seed have the same data
        for index, (label, digest) in enumerate(files)
    ]


def kept_runs(folder: Path, name: str) -> Path:
    """Return the folder of an experiment's runs."""
    return folder / ".runs" / name


def discard(folder: Path, name: str) -> None:
    """Forget the runs of an experiment."""
    shutil.rmtree(kept_runs(folder, name), ignore_errors=True)


def slug(label: str) -> str:
    """Return a setting's name as that of a model and a file."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")


def run_experiment(
    name: str, options: Options, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Path:
    """Do what is left of an experiment, and write its results; return their file.

    DataError: there is no Fashion-MNIST. BlockingIOError: another process runs the experiment.
    """
    with storage.alone_in(kept_runs(options.folder, name)):
        return _run(name, options, progress)


def _run(name: str, options: Options, progress: Callable[[int, int], None]) -> Path:
    experiment = experiments.load(name)
    tasks = _tasks(name, experiment, options)
    started = time.monotonic()
    left = [task for task in tasks if not task.file.exists()]
    done = len(tasks) - len(left)
    progress(done, len(tasks))
    for _ in _in_processes(left, options.processes):
        done += 1
        progress(done, len(tasks))
    found = [json.loads(task.file.read_text()) for task in tasks]
    runs: dict[str, list[Any]] = {setting.label: [] for setting in experiment.settings}
    for task, one in zip(tasks, found, strict=True):
        runs[experiment.settings[task.index].label].append(one["figures"])
    document = Document(
        {
            "experiment": name,
            "seeds": len(tasks) // len(experiment.settings),
            "quick": options.quick,
            "settings": {s.label: _describe(experiment, s) for s in experiment.settings},
            "runs": runs,
        },
        {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "processes": options.processes,
            "processor_seconds": round(sum(one["processor_seconds"] for one in found), 1),
            "wall_seconds": round(time.monotonic() - started, 1),
            "runs_before": len(tasks) - len(left),
        },
    )
    path = options.folder / f"{name}.json"
    write_document(path, with_estimates(experiment, document))
    return path


def _describe(experiment: Experiment, setting: Setting) -> dict[str, Any]:
    return {
        "network": experiment.network_of(setting).to_json(),
        "recipe": asdict(experiment.recipe_of(setting)),
        "values": {**setting.values, "images": experiment.images_of(setting)},
    }


def _in_processes(tasks: list[Task], processes: int) -> Iterator[None]:
    """Do the tasks, and yield after each."""
    if not tasks:
        return
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)), mp_context=get_context("spawn"), initializer=_start
    )
    try:
        futures = [pool.submit(_measure, task) for task in tasks]
        for future in as_completed(futures):
            future.result()
            yield
    finally:
        running = list((pool._processes or {}).values())  # noqa: SLF001  no public way
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:  # which would end their runs first
            process.terminate()


def _start() -> None:
    """Prepare a process: Ctrl-C is for the one that started it, without which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    import torch

    from dropserve.models.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _measure(task: Task) -> None:
    """Do one run, and keep what it measured."""
    experiment, options = experiments.load(task.name), task.options
    setting = experiment.settings[task.index]
    one = run.Run(experiment, setting, task.seed, options.data_dir, quick=options.quick)
    started = time.process_time()
    figures = _rounded(experiment.measure(one))
    seconds = time.process_time() - started
    if task.seed == 0:
        one.publish(options.checkpoints / task.name, slug(setting.label))
    kept = {"figures": figures, "processor_seconds": round(seconds, 2)}
    storage.replace_durably(task.file, json.dumps(kept).encode())


def _rounded(value: Any) -> Any:  # noqa: ANN401  numbers in lists and mappings
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_rounded(each) for each in value]
    return value

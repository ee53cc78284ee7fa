"""`dropserve lab`: runs experiments about dropout. Commands load PyTorch, this module does not."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dropserve.service.cli import options, terminal
from dropserve.service.cli.options import Opt

app = typer.Typer(no_args_is_help=True, help="Answer questions about dropout by measurement.")

FOLDER = Path("lab")
Results = Annotated[
    Path | None, Opt(help="Folder of results and plots; default: lab/results, or lab/quick.")
]


@app.command("list")
def list_(results: Results = None) -> None:
    """List the experiments, and which of them have results."""
    from dropserve.lab import experiments
    from dropserve.lab.results import read_document

    folder = results or FOLDER / "results"
    table = Table("name", "question", "runs", "measured", "core minutes")
    for name in experiments.NAMES:
        experiment = experiments.load(name)
        path = folder / f"{name}.json"
        date, minutes = "-", "-"
        if path.exists():
            measured = read_document(path).measured
            date, minutes = measured["date"], f"{measured['processor_seconds'] / 60:.0f}"
        runs = f"{len(experiment.settings)} settings x {experiment.seeds} seeds"
        table.add_row(name, experiment.question, runs, date, minutes)
    terminal.console().print(table)


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME|all ...", help="As in `lab list`.")],
    seeds: Annotated[
        int | None, Opt(min=1, metavar="N", help="Runs of each setting; default: as in `lab list`.")
    ] = None,
    quick: Annotated[
        bool, Opt("--quick", help="A short trial: its figures answer nothing, and go to lab/quick.")
    ] = False,
    restart: Annotated[
        bool, Opt("--restart", help="Discard the runs that are done, and start over.")
    ] = False,
    png: Annotated[bool, Opt("--png", help="Draw the plots as PNG, too.")] = False,
    processes: Annotated[
        int | None, Opt(min=1, metavar="N", help="Runs at a time; default: one a core.")
    ] = None,
    results: Results = None,
    checkpoints: Annotated[
        Path | None, Opt(help="Folder of versions; default: `checkpoints` beside the results.")
    ] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Run experiments, or what is left of them, and write results, plots and versions.

    A version of the network of each setting's first seed is in CHECKPOINTS/NAME.
    """
    data_dir = options.read_settings(data_dir=data_dir).data_dir
    folder = results or FOLDER / ("quick" if quick else "results")

    try:
        from dropserve.lab import experiments, page, plots, runner
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "scipy"):
            raise
        raise terminal.Refused(f"the lab needs {error.name}: install dropserve[lab]") from error
    from dropserve.lab.results import read_document
    from dropserve.lab.run import fashion_mnist, mnist

    if unknown := [name for name in names if name not in (*experiments.NAMES, "all")]:
        there = ", ".join(experiments.NAMES)
        raise terminal.Refused(f"no experiment {', '.join(unknown)}: there are {there}, and all")
    chosen = runner.Options(
        folder,
        data_dir,
        checkpoints or folder.with_name("quick-checkpoints" if quick else "checkpoints"),
        seeds,
        quick,
        processes or os.cpu_count() or 1,
    )
    wanted = [name for name in experiments.NAMES if name in names or "all" in names]
    fashion_mnist(data_dir)  # what is missing is told before the first run
    if "uncertainty" in wanted:
        mnist(data_dir)
    for name in wanted:
        if restart:
            runner.discard(folder, name)
        rest = " ".join(wanted[wanted.index(name) :])
        again = "the same command without --restart" if restart else "the same command"
        hint = f"{again} continues with {rest}; what is done is kept"
        with terminal.interruptible(lambda hint=hint: hint), terminal.progress(name) as progress:  # type: ignore[misc]
            try:
                path = runner.run_experiment(name, chosen, progress)
            except BlockingIOError as error:
                raise terminal.Refused(f"another process runs {name} into {folder}") from error
        document = read_document(path)
        drawn = [path.with_suffix(suffix) for suffix in (".svg", ".png")[: 1 + png]]
        plots.draw(experiments.load(name), document, drawn)
        terminal.say(f"{name}: {', '.join(map(str, (path, *drawn)))}")
        for lines in page.tables(experiments.load(name), document):
            head, *rows = lines
            shown = Table(*head)
            for row in rows:
                shown.add_row(*row)
            terminal.console().print(shown)

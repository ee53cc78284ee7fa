"""The documentation is held against the code: commands, outputs, settings, routes, the map."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from dropserve.models.hyperparameters import default_recipe
from dropserve.models.networks import default_config
from dropserve.service.app import create_app
from dropserve.service.cli.main import app as command_line
from dropserve.service.settings import Settings, environment_name

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs/api.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BELOW = (p for p in ROOT.glob("[!.]*/**/*.md") if "/." not in str(p.relative_to(ROOT)))
MARKDOWN = sorted({*PAGES, *BELOW})
URL = "http://127.0.0.1:8000"
DROPSERVE = Path(sys.executable).with_name("dropserve")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(program: str) -> list[str]:
    """Every line of a shell block, on any page, that calls a program."""
    lines = (
        line
        for page in PAGES
        for block in blocks(page.read_text(), "bash")
        for line in block.replace("\\\n", " ").splitlines()
    )
    return sorted({line.partition("  #")[0] for line in lines if line.startswith(program + " ")})


@pytest.fixture(scope="module")
def served(tmp_path_factory, make_server):
    """The default model, trained and served as the README says, but on a free port."""
    root = tmp_path_factory.mktemp("readme")
    train = [DROPSERVE, "train", "--dataset", "digits", "--epochs", "3", "--checkpoints", root]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
    return make_server(root, default_model=None).start().url


def shape(text: str) -> str:
    """An output with its numbers, digests and guessed labels masked: how it is built."""
    text = re.sub(r'("label":")\d|[0-9a-f]{64}', r"\1#", text)
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)


@pytest.mark.parametrize("block", blocks(README, "console"), ids=lambda b: b[2:60])
def test_readme_shows_what_its_commands_print(block, served):
    command, output = re.fullmatch(r"\$ (.*?[^\\])\n(.*)\n", block, re.DOTALL).groups()
    assert URL in command
    run = subprocess.run(  # noqa: S602  our own README
        command.replace(URL, served),
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    shown, printed = shape(output), shape(run.stdout)
    if "head -c" in command:  # numbers differ in length, so the cut falls elsewhere
        length = min(len(shown), len(printed)) - 40
        shown, printed = shown[:length], printed[:length]
    assert shown == printed


def test_readme_python_runs(served, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks(README, "python")
    exec(code.replace(URL, served), {})  # noqa: S102  our own README
    assert len(capsys.readouterr().out.split()) == 3


@pytest.mark.parametrize("command", commands("dropserve"))
def test_documented_commands_and_options_exist(command):
    _, name, *arguments = shlex.split(command)
    group = typer.main.get_command(command_line)
    found = group.get_command(None, name)
    assert found is not None
    found.make_context(name, arguments)  # parses and checks; runs nothing


@pytest.mark.parametrize("command", commands("make"))
def test_documented_make_targets_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_readme_lists_every_setting_with_its_default_and_meaning():
    rows = re.findall(r"^\| `(DROPSERVE_\w+)` \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    expected = [
        (
            environment_name(name),
            f"`{f.default}`" if f.default not in (None, ()) else "",
            f.description,
        )
        for name, f in Settings.model_fields.items()
    ]
    assert rows == expected


def test_api_page_lists_every_route_and_option():
    app = create_app(Settings())
    schema = app.openapi()
    served = {
        f"{method.upper()} {path}" for path, item in schema["paths"].items() for method in item
    }
    listed = set(re.findall(r"`((?:GET|POST) /\S*)`", API))
    assert listed == served | {"GET /"}
    for path, item in schema["paths"].items():
        for operation in item.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "query":
                    assert f"`{parameter['name']}`" in API, path


def test_training_page_states_the_recipes_and_sizes_that_are_used():
    page = (ROOT / "docs/training.md").read_text()
    row = r"^\| (\S+), (\w+): .*? \| ([\d,]+) \| (\d+) \| (\d+) \| (\.\d+) \| (\.\d+) \|"
    rows = re.findall(row, page, re.MULTILINE)
    assert len(rows) == 6
    for dataset, network, parameters, *numbers in rows:
        recipe = default_recipe(dataset, network, 1)
        stated = [float(number) for number in numbers]
        fields = recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay
        assert stated == list(fields), (dataset, network)
        shape = (1, 8, 8) if dataset == "digits" else (1, 28, 28)
        module = default_config(network, shape, 10).build()
        assert sum(p.numel() for p in module.parameters()) == int(parameters.replace(",", ""))


def test_the_map_shows_every_module_and_no_other():
    page = (ROOT / "docs/architecture.md").read_text()
    mapped = re.findall(r"\b(\w+\.py)\b", blocks(page, "")[1])
    modules = [
        path.name
        for top in ("models", "service", "lab")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "experiments"
    ]
    assert sorted(mapped) == sorted(modules)


def test_where_a_training_is_shown_both_its_rows_are():
    trainings = [
        block
        for page in PAGES
        for block in blocks(page.read_text(), "text")
        if "saved checkpoints" in block or "│ eval mode" in block
    ]
    assert len(trainings) >= 5
    for block in trainings:
        assert re.search(r"^│ eval mode .*\n│ Monte Carlo dropout", block, re.MULTILINE), block


def test_training_page_says_helps_or_hurts_as_its_figures_do():
    page = (ROOT / "docs/training.md").read_text()
    section = page.partition("## When Monte Carlo dropout helps")[2].partition("\n## ")[0]
    figure = r"(\.\d{4})"
    modes = [rf"\| {mode} \| " + r" \| ".join([figure] * 4) for mode in ("eval", "Monte Carlo")]
    rows = re.findall(rf"{modes[0]} \| \|\n\| \| {modes[1]} \| (.*?) \|", section)
    assert len(rows) >= 10
    for *figures, says in rows:
        _, confidence, nll, ece, _, less, mc_nll, mc_ece = map(float, figures)
        assert less < confidence
        better = (mc_nll < nll, mc_ece < ece)
        words = {(True, True): "helps", (False, False): "hurts", (True, False): "helps the NLL"}
        assert says == words[better]


def test_reliability_page_has_every_figure_that_was_measured():
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    page, results = (ROOT / "docs/reliability.md").read_text(), generate["read_results"]()
    assert page == generate["write_figures"](page, results), "make docs writes it anew"
    assert set(results) <= set(re.findall("<!-- (.+): generated -->", page))


@pytest.mark.parametrize("name", ["training", "deployment"])
def test_page_has_what_was_measured_of_scaling(name):
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    page = (ROOT / f"docs/{name}.md").read_text()
    results = generate["read_results"](generate["SCALING"])
    assert page == generate["write_figures"](page, results), "make docs writes it anew"


def test_figures_that_were_not_held_are_shown_as_such():
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    machine = {"cpu": "a CPU", "cores": 2}
    result = {"command": "make soak", "date": "2026-01-01", "commit": "abc", "machine": machine}
    result |= {"passed": False, "figures": {"requests": 100_000, "p99, ms": 1.5}}
    page = generate["write_figures"]("<!-- a: generated -->\n<!-- end -->", {"a": result})
    assert "| requests | 100,000 |\n| p99, ms | 1.5 |\n" in page
    assert "2026-01-01, commit abc, a CPU with 2 cores: **a limit was not held**.\n" in page


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(page):
    links = re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", without_code(page.read_text()))
    for path, _, anchor in (link.partition("#") for link in links):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Name the headings of a page as GitHub links to them, and its anchors."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    named = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | {*re.findall(r'<a id="([^"]+)">', text)}

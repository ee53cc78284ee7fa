"""Writes the tables of api.md, reliability.md, deployment.md, training.md and results.md in docs.

By `make docs`. The first are in the OpenAPI document, the second were measured by `make soak`, the
third by `make test-scale` and `make bench-bulk`, the fourth by `make bench-distributed`, the last
by `dropserve lab run`; these are a page of the playground, too. They stand between
`<!-- NAME: generated -->` and `<!-- end -->`; all else on the pages is by hand.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from dropserve.lab import experiments, plots
from dropserve.lab import page as lab
from dropserve.service.app import create_app
from dropserve.service.http.openapi import shortest_path
from dropserve.service.settings import Settings

PAGE = Path(__file__).with_name("api.md")
RELIABILITY = Path(__file__).with_name("reliability.md")
TRAINING = Path(__file__).with_name("training.md")
DEPLOYMENT = Path(__file__).with_name("deployment.md")
LAB = Path(__file__).with_name("results.md")
PICTURES = {"data": 1, "weights": 0, "uncertainty": 1}
"""Experiments of which the README shows a panel."""
PLAYGROUND = Path(__file__).parent.parent / "service/playground"
RESULTS = Path(__file__).parent.parent / "bench/results/reliability"
SCALING = RESULTS.with_name("scaling")

Document = Mapping[str, Any]


def write(page: str, document: Document) -> str:
    """Return the page of the API with its tables as the document has them."""
    for name, table in (("options", options), ("responses", responses), ("types", types)):
        page = fill(page, name, table(document))
    return page


def write_figures(page: str, results: Mapping[str, Document]) -> str:
    """Return a page with a table for each test or benchmark whose name it has."""
    tables = {"distributed": distributed, "bulk": bulk}
    for name in re.findall("<!-- (.+): generated -->", page):
        table, result = tables.get(name, figures), results.get(name)
        page = fill(page, name, table(result) if result else ["Not measured yet."])
    return page


def distributed(result: Document) -> Iterator[str]:
    """Yield a table of processes, threads and parts of a batch, and on what they were measured."""
    yield "| network, batch | | images/s | speed-up | efficiency | peak memory of a process |"
    yield "|---|---|---|---|---|---|"
    for row in result["rows"]:
        speed, peak = f"{row['images_per_second']:,.0f}", f"{row['peak_bytes'] / 1e6:,.0f} MB"
        ratios = f"{row['speedup']:.2f}", f"{row['efficiency']:.0%}"
        yield _row(f"{row['network']}, {row['batch']:,}", row["way"], speed, *ratios, peak)
    yield from ("", _made(result))


def bulk(result: Document) -> Iterator[str]:
    """Yield a table of processor time by the engines of `score`, and on what it was measured."""
    yield "| engine | mode | us an image | with its start | images/s | s, all | times HTTP |"
    yield "|---|---|---|---|---|---|---|"
    targets, ends = result["targets"], ("", "_with_start")
    for row in result["rows"]:
        times = targets.get(f"{row['engine']}, {row['mode']}: times HTTP", 1.0)
        figures = [row[f"microseconds_per_image{end}"] for end in ends]
        figures += row["images_per_second"], row["seconds"]
        shown = (f"{figure:,.0f}" for figure in figures)
        yield _row(row["engine"], row["mode"], *shown, f"{times:.1f}")
    two = (f"{v:.2f} ({n.rpartition(', ')[2]})" for n, v in targets.items() if "2 actors by" in n)
    yield from ("", f"With 2 actors an image takes {' and '.join(two)} times what it takes with 1.")
    yield from ("", _made(result))


def _made(result: Document) -> str:
    machine, torch = result["machine"], result["versions"]["torch"]
    about = f"`{result['command']}`, {result['date']}, {machine['cpu']}"
    return f"{about} with {machine['cores']} cores, PyTorch {torch}."


def read_results(folder: Path = RESULTS) -> dict[str, Document]:
    """Read what tests have measured, by their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def fill(page: str, name: str, table: Iterable[str]) -> str:
    """Replace what is between a table's marks."""
    start = f"<!-- {name}: generated -->\n"
    before, found, rest = page.partition(start)
    _, end, after = rest.partition("<!-- end -->")
    if not found or not end:
        raise ValueError(f"there is no {start.strip()} with an end")
    lines = "\n".join(table).strip()
    return f"{before}{start}\n{lines}\n\n{end}{after}"


def figures(result: Document) -> Iterator[str]:
    """Yield a table of what a test measured, and on what."""
    yield from ("| measured | figure |", "|---|---|")
    for label, value in result["figures"].items():
        yield _row(label, f"{value:,}" if isinstance(value, int) else str(value))
    machine = result["machine"]
    about = f"`{result['command']}`, {result['date']}, commit {result['commit']}"
    outcome = "every limit was held" if result["passed"] else "**a limit was not held**"
    yield from ("", f"{about}, {machine['cpu']} with {machine['cores']} cores: {outcome}.")


def options(document: Document) -> Iterator[str]:
    """Yield a table of what may stand in a query."""
    yield from ("| of | option | values | default | meaning |", "|---|---|---|---|---|")
    for path, operation in _operations(document):
        for option in operation.get("parameters", ()):
            if option["in"] == "query":
                schema = option["schema"]
                cells = f"`{option['name']}`", _values(schema), _code(schema.get("default"))
                yield _row(f"`{path.partition(' ')[2]}`", *cells, schema.get("description", ""))


def responses(document: Document) -> Iterator[str]:
    """Yield a table of the types of the answers, and of the errors that a route may have."""
    yield from ("| route | answer | errors |", "|---|---|---|")
    for path, operation in _operations(document):
        found = operation["responses"]
        answers = ", ".join(
            _answer(media_type, content) for media_type, content in found["200"]["content"].items()
        )
        yield _row(f"`{path}`", answers, ", ".join(s for s in found if s >= "400"))


def types(document: Document) -> Iterator[str]:
    """Yield a heading and a table for each type."""
    for name, schema in sorted(document["components"]["schemas"].items()):
        description = " ".join(schema.get("description", "").split())
        yield from (f"### {name}", "", description, "")
        yield from ("| field | type | meaning |", "|---|---|---|")
        required = schema.get("required", ())
        for field, found in schema["properties"].items():
            optional = "" if field in required else ", optional"
            yield _row(f"`{field}`", _type(found) + optional, found.get("description", ""))
        yield ""


def _operations(document: Document) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield routes, the shortest of those that answer alike."""
    seen = set()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if (alike := (method, shortest_path(path))) not in seen:
                seen.add(alike)
                yield f"{method.upper()} {path}", operation


def _answer(media_type: str, content: Mapping[str, Any]) -> str:
    if media_type == "application/json":
        return _type(content["schema"])
    events = content.get("itemSchema", {"oneOf": ()})["oneOf"]
    kinds = [_type(event["properties"]["data"]["contentSchema"]) for event in events]
    return f"`{media_type}`" + (f" of {' or '.join(kinds)}" if kinds else "")


def _type(schema: Mapping[str, Any]) -> str:
    """Name a type as a reader knows it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if schema.get("type") == "array":
        kind = _type(schema["items"])
        return f"list of {kind}s" if kind in ("string", "number", "integer") else f"list of {kind}"
    if "const" in schema or "enum" in schema:
        return _values(schema)
    if isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def _values(schema: Mapping[str, Any]) -> str:
    """Say which values there may be."""
    for choice in schema.get("anyOf", ()):
        if choice["type"] != "null":
            return _values(choice)
    if "const" in schema or "enum" in schema:
        return ", ".join(_code(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "boolean":
        return "`true`, `false`"
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    high = "2^63-1" if high == 2**63 - 1 else high
    least = f"{low}" if low is not None else f"above {above}"
    most = f"{high}" if high is not None else f"below {below}"
    return f"{least} to {most}"


def _code(value: object) -> str:
    return "" if value is None else f"`{str(value).lower() if value in (True, False) else value}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def rendered(lines: Iterable[str]) -> str:
    """Return measured answers as HTML of the playground; what is wide scrolls by itself."""
    html = MarkdownIt().enable("table").render("\n".join(lines))
    wide = r'<div class="scroll" tabindex="0" role="group" aria-label="\2">\1</div>'
    html = re.sub('<p>(<img src="[^"]*" alt="([^"]*)" />)</p>', wide, html)
    html = re.sub("(<table>.*?</table>)()", wide.replace(r"\2", "Figures"), html, flags=re.DOTALL)
    return html.replace("../service/playground/", "")


def main() -> None:
    """Write the pages anew."""
    PAGE.write_text(write(PAGE.read_text(), create_app(Settings()).openapi()))
    RELIABILITY.write_text(write_figures(RELIABILITY.read_text(), read_results()))
    for page in (TRAINING, DEPLOYMENT):
        page.write_text(write_figures(page.read_text(), read_results(SCALING)))
    documents = lab.refresh()
    for name, document in documents.items():
        experiment = experiments.load(name)
        plots.draw(experiment, document, [PLAYGROUND / f"results/{name}.svg"])
        if name in PICTURES:
            alone = replace(experiment, panels=[experiment.panels[PICTURES[name]]])
            plots.draw(alone, document, [PAGE.parent / f"images/lab-{name}.svg"])
    answers = list(lab.lines(documents))
    LAB.write_text(fill(LAB.read_text(), "experiments", answers))
    web = PLAYGROUND / "results.html"
    web.write_text(fill(web.read_text(), "experiments", [rendered(answers)]))


if __name__ == "__main__":
    main()

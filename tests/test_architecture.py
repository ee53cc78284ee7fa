"""The import rules of docs/architecture.md."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "httpx", "typer"}
FILES = {
    ".".join(("dropserve", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for folder in ("models", "service", "lab")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
DEFAULTS = "models.defaults"
LIGHT = {"service.client", "service.schemas", "service.errors", "service.settings", DEFAULTS}
"""Modules that a client or a command line may load: no torch, no NumPy."""
LAYERS = ("observability", "inference", "http", "fastpath", "cli")
"""Packages of `service`; one may import from those before it."""


def imports(path: Path, *, deferred: bool = True) -> set[str]:
    """Name every module that a file imports: anywhere in it, or when it is loaded."""
    found = set()
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not deferred and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ):
            continue
        nodes += ast.iter_child_nodes(node)
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def ours(module: str, *, deferred: bool = True) -> set[str]:
    return imports(FILES[module], deferred=deferred) & FILES.keys() - {module}


def named(*starts: str) -> list[str]:
    return [module for module in FILES if module.startswith(starts)]


def layer(module: str) -> int:
    package = module.split(".")[2] if module.count(".") > 1 else ""
    return LAYERS.index(package) if package in LAYERS else -1


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: ours(module) for module in FILES}
    assert graph["dropserve.service.app"]
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", named("dropserve.models"))
def test_models_know_nothing_of_the_web_or_the_service(module):
    assert not packages(FILES[module]) & (WEB - {"pydantic"} | {"bench"})
    assert not [n for n in ours(module) if n.startswith(("dropserve.service", "dropserve.lab"))]


@pytest.mark.parametrize("module", named(*(f"dropserve.service.{name}." for name in LAYERS)))
def test_a_package_of_the_service_imports_only_from_those_below_it(module):
    found = {name for name in ours(module) if layer(name) > layer(module)}
    assert not found


@pytest.mark.parametrize("module", named("dropserve.lab"))
def test_the_lab_needs_models_and_of_the_service_what_commands_share(module):
    assert "bench" not in packages(FILES[module])
    found = {name for name in ours(module) if name.startswith("dropserve.service.")}
    shared = {f"dropserve.service.cli{name}" for name in ("", ".options", ".terminal")}
    assert found <= (shared if module == "dropserve.lab.cli" else set())


def test_only_the_command_line_knows_the_lab():
    users = [m for m in FILES if any(n.startswith("dropserve.lab") for n in ours(m))]
    assert [m for m in users if not m.startswith("dropserve.lab")] == ["dropserve.service.cli.main"]


def test_nothing_but_the_server_enables_the_fast_path():
    users = [m for m in FILES if any(n.startswith("dropserve.service.fastpath") for n in ours(m))]
    assert [m for m in users if not m.startswith("dropserve.service.fastpath")] == [
        "dropserve.service.server"
    ]


@pytest.mark.parametrize("module", named("dropserve.service"))
def test_only_inference_and_the_command_line_import_more_of_models_than_constants(module):
    found = {name for name in ours(module) if name.startswith("dropserve.models")}
    if layer(module) not in (LAYERS.index("inference"), LAYERS.index("cli")):
        assert found <= {f"dropserve.{DEFAULTS}", "dropserve.models.image_formats"}
        assert "torch" not in packages(FILES[module])


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_pickled(module):
    path = FILES[module]
    assert not packages(path) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = {
        ast.unparse(n.func)
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call)
    }
    assert not calls & {"torch.load", "torch.save"}


def test_the_client_needs_only_the_schemas_the_errors_and_httpx():
    allowed = {"dropserve.service", "dropserve.models"} | {f"dropserve.{name}" for name in LIGHT}
    assert ours("dropserve.service.client") <= allowed
    loaded = imports(FILES["dropserve.service.client"], deferred=False)  # Pillow when it is needed
    others = {name.partition(".")[0] for name in loaded} - {"dropserve"} - sys.stdlib_module_names
    assert others == {"httpx", "pydantic"}


def test_the_batcher_knows_neither_torch_nor_http():
    assert packages(FILES["dropserve.service.inference.batcher"]) <= sys.stdlib_module_names


def test_importing_starts_no_thread_and_opens_no_socket():
    code = (
        "import sys, threading\n"
        "def audit(event, args):\n"
        "    if event in ('socket.connect', 'socket.bind', 'pickle.find_class'):\n"
        "        raise SystemExit(f'{event} {args}')\n"
        "sys.addaudithook(audit)\n"
        f"import {', '.join(FILES)}\n"
        "print(threading.active_count())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "1"), run.stderr

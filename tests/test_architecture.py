"""The rules of the house, as docs/architecture.md states them, held against the code's imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "httpx", "typer"}
MODELS = sorted((ROOT / "models").rglob("*.py"))
SERVICE = sorted((ROOT / "service").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Name every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_walk_sees_the_code():
    assert {"models/montecarlo/sampler.py", "models/checkpoint.py"} <= set(map(relative, MODELS))
    assert {"service/routes/native.py", "service/client.py"} <= set(map(relative, SERVICE))
    assert "torch" in packages(ROOT / "service/classifier.py")


@pytest.mark.parametrize("path", MODELS, ids=relative)
def test_models_know_nothing_of_the_web_or_the_service(path):
    assert not packages(path) & (WEB | {"service", "bench", "lab"})


@pytest.mark.parametrize("path", SERVICE, ids=relative)
def test_only_the_door_and_the_command_line_touch_models_and_torch(path):
    allowed = {"service/classifier.py", "service/inference.py", "service/cli.py"}
    allowed.add("service/commands/versions.py")
    used = packages(path) & {"models", "torch"}
    assert not used or relative(path) in allowed


@pytest.mark.parametrize("path", [*MODELS, *SERVICE], ids=relative)
def test_nothing_is_pickled(path):
    assert not packages(path) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = {
        ast.unparse(n.func)
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call)
    }
    assert not calls & {"torch.load", "torch.save"}


def test_the_client_needs_only_the_schemas_the_errors_and_httpx():
    light = ("service.schemas", "service.events", "service.errors", "service.calls")
    for path in (ROOT / "service/client.py", ROOT / "service/calls.py"):
        ours = {name for name in imports(path) if name.startswith("service.")}
        assert all(name.startswith(light) for name in ours)
        others = packages(path) - {"service"} - sys.stdlib_module_names
        assert others <= {"httpx", "pydantic"}


def test_the_batcher_knows_neither_torch_nor_http():
    assert packages(ROOT / "service/batching.py") <= sys.stdlib_module_names


def test_importing_the_client_loads_no_torch():
    code = "import service.client, sys; print({m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "httpx" in loaded
    for heavy in ("'torch'", "'numpy'", "'fastapi'", "'models'", "'PIL'"):
        assert heavy not in loaded


def test_importing_the_app_starts_no_thread_and_opens_no_socket():
    code = (
        "import sys, threading\n"
        "def audit(event, args):\n"
        "    if event in ('socket.connect', 'socket.bind', 'pickle.find_class'):\n"
        "        raise SystemExit(f'{event} {args}')\n"
        "sys.addaudithook(audit)\n"
        "import service.app, service.server, service.cli, models.evaluation\n"
        "print(threading.active_count())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "1"), run.stderr

"""Factories by file: whose code runs, and whose does not."""

import sys

import pytest
from torch import nn

from dropserve.models.errors import ConfigError
from dropserve.models.networks import call_factory, trusted

NETS = """
from torch import nn
import blocks
from .blocks import width
def make(extra=0):
    return nn.Linear(blocks.width(), width() + extra)
"""


def write(folder, width, name="nets.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(NETS)
    (folder / "blocks.py").write_text(f"def width():\n    return {width}\n")
    return folder / name


def test_files_and_neighbours_of_one_name_are_different_modules(tmp_path):
    before = set(sys.modules), list(sys.path)
    for width in (3, 4):
        module = call_factory(f"{write(tmp_path / str(width), width)}:make", {"extra": 1})
        assert isinstance(module, nn.Linear)
        assert (module.in_features, module.out_features) == (width, width + 1)
    assert sys.path == before[1]
    assert {
        name for name in set(sys.modules) - before[0] if not name.startswith("_factory_")
    } == set()


def test_a_file_that_was_edited_is_run_anew_with_its_neighbours(tmp_path):
    file = write(tmp_path / "a", 3)
    assert call_factory(f"{file}:make", {}).in_features == 3
    write(tmp_path / "a", 1234)  # of another length, so that no cached byte code is taken for it
    module = call_factory(f"{file}:make", {})
    assert (module.in_features, module.out_features) == (1234, 1234)


def test_a_relative_path_starts_in_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "a:b", 5, name="my nets.v2.py")
    monkeypatch.chdir(tmp_path)
    assert call_factory("a:b/my nets.v2.py:make", {}).in_features == 5


@pytest.mark.parametrize(
    ("code", "name", "reason"),
    [
        ("def make(:", "make", r"bad\.py:make: SyntaxError: .*bad\.py, line 1"),
        ("import sys; sys.exit(3)", "make", r"bad\.py:make: SystemExit: 3"),
        ("", "make", r"bad\.py:make: AttributeError: .*no attribute 'make'"),
        ("def make():\n    raise OSError('no')", "make", r"bad\.py:make: OSError: no"),
        (None, "make", r"bad\.py:make: FileNotFoundError"),
    ],
    ids=["syntax", "exit", "missing", "failing", "no file"],
)
def test_a_file_that_fails_is_named(tmp_path, code, name, reason):
    if code is not None:
        (tmp_path / "bad.py").write_text(code)
    path = list(sys.path)
    with pytest.raises(ConfigError, match=reason):
        call_factory(f"{tmp_path / 'bad.py'}:{name}", {})
    assert sys.path == path


@pytest.mark.parametrize("form", ["dropserve.models.nets:make", "models:make"])
def test_a_package_that_ours_hides_is_explained(tmp_path, monkeypatch, form):
    own = write(tmp_path / "models", 3, "nets.py" if "nets" in form else "__init__.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    file = own.relative_to(tmp_path)
    with pytest.raises(
        ConfigError,
        match=f"'models' is another package here, .*: name the file of yours, {file}:make",
    ):
        call_factory(form, {})
    assert call_factory(f"{file}:make", {}).in_features == 3


def test_a_file_that_imports_from_a_package_that_ours_hides_is_explained(tmp_path):
    (tmp_path / "nets.py").write_text("from models.blocks import width")
    with pytest.raises(
        ConfigError, match=r"No module named 'dropserve.models.blocks'; 'models' is another"
    ):
        call_factory(f"{tmp_path / 'nets.py'}:make", {})


@pytest.mark.parametrize(
    ("name", "allowed", "meant"),
    [
        ("a.b:f", ["a.b:f"], "a.b:f"),
        ("x/nets.py:f", ["x/nets.py:f", "y/nets.py:f"], "x/nets.py:f"),
        ("./x//nets.py:f", ["x/nets.py:f", "y/nets.py:f"], "x/nets.py:f"),
        ("/home/me/nets.py:f", ["/srv/nets.py:f", "/srv/nets.py:g"], "/srv/nets.py:f"),
    ],
)
def test_a_file_is_known_by_its_path_or_else_its_name(name, allowed, meant):
    assert trusted(name, allowed) == meant


@pytest.mark.parametrize(
    ("name", "allowed", "reason"),
    [
        ("os:system", ["a.b:system", "/x/nets.py:g"], r"named there: a.b:system, nets.py:g$"),
        ("nets.py:g", ["nets.py:f"], "not trusted"),
        ("evil/blocks.py:f", ["nets.py:f"], "not trusted"),
        ("nets:f", ["nets.py:f"], "not trusted"),
        ("a.nets:f", ["b.nets:f"], "not trusted"),
        ("z/nets.py:f", ["x/nets.py:f", "y/nets.py:f"], "x/nets.py:f or y/nets.py:f"),
    ],
)
def test_what_is_not_allowed_or_not_clear_is_refused(name, allowed, reason):
    with pytest.raises(ConfigError, match=reason):
        trusted(name, allowed)

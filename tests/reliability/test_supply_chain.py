"""Which packages are asked for, pinned and locked, and the workflow that runs the tests."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.helpers import needed

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
BUILD = PYPROJECT["build-system"]["requires"]
(TORCH,) = PYPROJECT["tool"]["uv"]["dependency-metadata"]
WORKFLOW = ROOT / ".github/workflows/ci.yml"

# The lowest versions without a known vulnerability.
SAFE = {
    "h11": "0.16",
    "pillow": "12.3",
    "python-multipart": "0.0.32",
    "starlette": "1.3.1",
    "torch": "2.10",
}
ENTRY = re.compile(r"([A-Za-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def constraints(extra=""):
    """Read the pins of what `make setup` installs, or of what the extra ray brings besides."""
    text = (ROOT / "constraints.txt").read_text()
    lines = [line.partition("  # ")[::2] for line in text.splitlines() if not line.startswith("#")]
    pins = (pin.split("==") for pin, of in lines if of == extra)
    return {canonicalize_name(name): version for name, version in pins}


def lock(name):
    """Read the versions in a lock file; anything but hashed entries, such as an index, fails."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)
    entries = ENTRY.findall(text)
    assert ENTRY.sub("", text) == ""
    return {canonicalize_name(name): version for name, version, _ in entries}


def versions(requirements, instead=None):
    """Map what requirements lead to to the versions at hand, less local parts such as +cpu."""
    return {
        canonicalize_name(distribution.name): Version(distribution.version).public
        for distribution in needed(requirements, instead)
    }


@pytest.mark.parametrize(("name", "safe"), SAFE.items())
def test_versions_with_known_vulnerabilities_cannot_be_installed(name, safe):
    (requirement,) = [r for r in map(Requirement, DEPENDENCIES) if r.name == name]
    lower = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
    assert max(lower) >= Version(safe)


def test_constraints_pin_what_the_tests_run_with_and_nothing_else():
    at_hand = versions([*DEPENDENCIES, *EXTRAS["dev"]])
    # On some machines PyTorch brings a GPU's libraries along, and chooses their versions itself.
    unpinned = at_hand.keys() - constraints().keys() - versions(["torch"]).keys()
    assert not unpinned
    assert constraints() == {name: at_hand.get(name) for name in constraints()}


@pytest.mark.skipif(find_spec("ray") is None, reason="`make test-scale` installs it")
def test_constraints_pin_what_ray_brings_and_say_so():
    brought = versions(EXTRAS["ray"])
    others = versions([*DEPENDENCIES, *EXTRAS["dev"]])
    assert constraints("ray") == {n: v for n, v in brought.items() if n not in others}


def test_constraints_suit_any_build_of_a_version():
    assert not [version for version in constraints().values() if Version(version).local]


def test_locks_hold_every_package_of_the_image_at_the_tested_version_and_nothing_else():
    torch, rest = lock("torch.lock"), lock("requirements.lock")
    assert torch.keys() == {"torch"}
    assert "torch" not in rest
    image = [*DEPENDENCIES, *EXTRAS["otel"], *BUILD]
    assert torch | rest == versions(image, {"torch": TORCH["requires-dist"]})


def test_requirements_of_pytorchs_cpu_build_are_stated_as_it_states_them():
    (torch,) = [d for d in needed(["torch"]) if d.name == "torch"]
    asked = [text for text in torch.requires if "extra ==" not in text]
    gpu = re.compile(r"nvidia|cuda|triton")
    assert TORCH["name"] == "torch"
    assert sorted(TORCH["requires-dist"]) == sorted(t for t in asked if not gpu.match(t))


def test_locked_versions_satisfy_what_is_asked_for():
    locked = lock("torch.lock") | lock("requirements.lock")
    for requirement in map(Requirement, [*DEPENDENCIES, *EXTRAS["otel"], *BUILD]):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_workflow_follows_the_schema_of_github():
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    done = subprocess.run(
        [*check, "vendor.github-workflows", WORKFLOW], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_workflow_runs_the_tests_with_pinned_actions_and_no_rights_but_to_read():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"make test", "make test-compose"} <= {step.get("run") for step in steps}
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 60

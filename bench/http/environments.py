"""One virtual environment a peer, under bench/.venvs, with what its file in requirements/ pins."""

import json
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
VENVS = HERE.parent / ".venvs"
REQUIREMENTS = HERE / "requirements"

_VERSIONS = """
import importlib.metadata as m, json, platform, sys
print(json.dumps({"python": platform.python_version(), **{n: m.version(n) for n in sys.argv[1:]}}))
"""


class NotInstalled(Exception):
    """A peer's packages cannot be installed here; says why."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, by the name of its requirements file."""

    name: str

    @property
    def folder(self) -> Path:
        """Where it is."""
        return VENVS / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def make(self) -> None:
        """Make it unless it is there as its requirements want it.

        Raises:
            NotInstalled: pip could not.
        """
        wanted = "".join((REQUIREMENTS / f).read_text() for f in ("base.txt", f"{self.name}.txt"))
        digest, mark = sha256(wanted.encode()).hexdigest(), self.folder / "installed"
        if mark.exists() and mark.read_text() == digest:
            return
        VENVS.mkdir(exist_ok=True)
        (VENVS / ".gitignore").write_text("*\n")
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        file = str(REQUIREMENTS / f"{self.name}.txt")
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "-r", file]
        if (done := subprocess.run(pip, capture_output=True, text=True, check=False)).returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise NotInstalled(" ".join(errors[-2:])[:500] or "pip failed")
        mark.write_text(digest)

    def versions(self, packages: tuple[str, ...]) -> dict[str, str]:
        """Return the versions of python, torch and `packages` in it."""
        command = [str(self.python), "-c", _VERSIONS, "torch", *packages]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {str(k): str(v) for k, v in json.loads(out).items()}

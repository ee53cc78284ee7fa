"""The tutorial, followed: every command in its order, and what the page says that one sees.

Only the training is cut short. Fashion-MNIST is looked for in the folder that DROPSERVE_DATA_DIR
names or in `../shared/data`; its part is skipped where it is not, because it would be downloaded.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from dropserve.service.cli.main import app as command_line
from tests.helpers import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("DROPSERVE_DATA_DIR", ROOT.parent / "shared" / "data"))
PARTS = re.split(r"^(?=## )", (ROOT / "docs/tutorial.md").read_text(), flags=re.MULTILINE)[1:]
SETUP = ("make setup", "source .venv/bin/activate")  # done before the tests run
WORDS = (
    "circle|square|triangle|pentagon|"
    "t-shirt|trouser|pullover|dress|coat|sandal|shirt|sneaker|bag|ankle boot"
)


def title(part: str) -> str:
    return part.splitlines()[0]


def masked(text: str) -> list[str]:
    """Lines without what another training changes: figures, bars, guesses, and their room."""
    text = re.sub(rf"[█▓░]+|{WORDS}", "#", text)
    text = re.sub(r"\d+(,\d{3})*(\.\d+)?(e-?\d+)?", "#", text)
    return [
        re.sub(r"(\s*#)+", "#", re.sub(r"\s+", " ", line)).strip() for line in text.splitlines()
    ]


class Reader:
    """Somebody with two terminals and a fresh folder who does as the page says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._service: subprocess.Popen[bytes] | None = None
        self._followed: list[str] = []
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        given = {"PORT": str(port), "DATA_DIR": str(DATA), "POLL_SECONDS": "0.1"}
        given["PRECISION"] = "float32"  # as shown; where there is bfloat16, a measurement chooses
        self._environment = (
            {k: v for k, v in os.environ.items() if not k.startswith("DROPSERVE_")}
            | {f"DROPSERVE_{k}": v for k, v in given.items()}
            | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
            | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        )
        (folder / "docs").symlink_to(ROOT / "docs")

    def follow(self, part: str) -> None:
        """Run a part's commands, those of a block at once, and compare what they print."""
        self._followed.append(title(part))
        steps = re.findall(r"```bash\n(.*?)```(?:\n\n```text\n(.*?)```)?", part, re.DOTALL)
        assert steps
        for commands, shown in steps:
            printed = masked(self._run(commands))
            for line in masked(shown):
                whole = line.removesuffix("...")
                found = [p for p in printed if p == line or (whole != line and p.startswith(whole))]
                assert found, (line, printed)

    def _run(self, commands: str) -> str:
        lines = [line for line in commands.splitlines() if line not in SETUP]
        commands = "\n".join(lines).replace("http://127.0.0.1:8000", self._url)
        commands = commands.replace("\\\n", " ")
        if commands.endswith("dropserve serve"):
            self.stop()
            self._serve(commands)
            return ""
        shell, *rest = re.split(r"^(dropserve train .*)$", commands, flags=re.MULTILINE)
        printed = self._shell(shell)
        for train, shell in zip(rest[::2], rest[1::2], strict=True):
            printed += self._train(shlex.split(train)) + self._shell(shell)
        return printed

    def _shell(self, commands: str) -> str:
        run = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", commands],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def _train(self, command: list[str]) -> str:
        """Train a little, in this process: importing PyTorch takes longer."""
        with pytest.MonkeyPatch.context() as here:
            here.chdir(self._folder)
            here.setattr(sys, "path", sys.path.copy())
            run = CliRunner().invoke(
                command_line,
                [*command[1:], "--epochs", "1", "--samples", "2"],
                env={k: v for k, v in self._environment.items() if k.startswith(("DROP", "COL"))},
            )
        assert run.exit_code == 0, run.output
        self._wait_for(re.findall(r"saved checkpoints/(\S+)/(\d+)", run.stdout))
        return run.stdout

    def _serve(self, command: str) -> None:
        with (self._folder / "log").open("wb") as log:
            self._service = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        self._wait_for([("digits-mlp", "1")])

    def _wait_for(self, saved: list[tuple[str, str]]) -> None:
        """Wait as the page says until the service has found what was trained, or refused it."""
        for name, version in saved if self._service is not None else ():
            address = f"{self._url}/v1/models/{name}/versions/{version}"
            for _ in range(600):
                time.sleep(0.05)
                refused = f'"version refused","model":"{name}","version":{version}'
                try:
                    found = httpx.get(address).status_code == 200
                except httpx.TransportError:
                    continue
                if found or refused in (self._folder / "log").read_text():
                    break
            else:
                raise AssertionError(f"{name} {version}: {(self._folder / 'log').read_text()}")

    def stop(self) -> None:
        """Press Ctrl-C in the first terminal."""
        if self._service is not None:
            self._service.send_signal(signal.SIGINT)
            self._service.wait(30)
            self._service = None


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("tutorial"))
    yield reader
    reader.stop()


@pytest.mark.parametrize("part", PARTS, ids=title)
def test_the_tutorial_does_what_it_says(part, reader):
    if "Fashion" in title(part) and not (DATA / "fashion-mnist").is_dir():
        pytest.skip("Fashion-MNIST is not in DROPSERVE_DATA_DIR")
    reader.follow(part)

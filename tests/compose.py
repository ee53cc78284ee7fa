"""docker-compose.yml as it stands, in real containers: `make test-compose`, by Docker or podman.

The tests follow one another: what one leaves behind, the next finds. They have a project, volumes
and a port of their own. The image is built first, unless BUILD=no says that `dropserve` is there.
"""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

from tests.helpers import free_port, zero

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/deployment.md").read_text()
PROJECT = "dropserve-test"
GRACE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["service"][
    "stop_grace_period"
]
INSIDE = """
import errno, json, os
from pathlib import Path

def refused(path):
    try:
        Path(path, "probe").touch()
    except OSError as error:
        return errno.errorcode[error.errno]

status = dict(line.split(":\\t", 1) for line in Path("/proc/1/status").read_text().splitlines())
folders = {path: refused(path) for path in ("/", "/opt/dropserve", "/checkpoints", "/tmp")}
wanted = ("Uid", "Gid", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs")
print(json.dumps([{k: status[k].split() for k in wanted}, folders]))
"""
KILL = """
import os, signal
from pathlib import Path

for folder in Path("/proc").glob("[0-9]*"):
    command = (folder / "cmdline").read_bytes().split(b"\\0")
    if b"serve" in command and int(folder.name) not in (1, os.getpid()):
        os.kill(int(folder.name), signal.SIGKILL)
"""
OUT_OF_MEMORY = """
from pathlib import Path

processes = Path("/proc").glob("[0-9]*")
worker = next(p for p in processes if b"spawn_main" in (p / "cmdline").read_bytes())
(worker / "oom_score_adj").write_text("1000")  # the kernel kills it before others
held = []
while worker.exists() and len(held) < 200:
    held.append(b"x" * 2**24)
print(worker.name)
"""


@dataclass(frozen=True)
class Stack:
    """A Compose project of its own.

    Attributes:
        engine: docker or podman.
        compose: its Compose command.
        folder: where the Compose files are.
        port: of this machine, on which the service is published.
    """

    engine: str
    compose_command: tuple[str, ...]
    folder: Path
    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DROPSERVE_")}
        environment |= {"DROPSERVE_PORT": str(self.port), "PWD": str(self.folder)}
        environment["BUILDAH_FORMAT"] = "docker"  # podman's own has no health checks
        command = [*self.compose_command, "-p", PROJECT, *arguments]
        return run(*command, cwd=self.folder, env=environment)

    def container(self, service):
        """Find a service's container, running or not; None: there is none."""
        ids = self._labelled("ps", "--all", "--quiet", service=service).split()
        return ids[0] if ids else None

    def volumes(self):
        return self._labelled("volume", "ls", "--quiet").split()

    def inside(self, service, program):
        """Run a Python program in a service's container; return what it printed."""
        return run(self.engine, "exec", self.container(service), "python", "-c", program)

    def inspect(self, service, template):
        return run(self.engine, "inspect", "--format", template, self.container(service)).strip()

    def log(self, service):
        return run(self.engine, "logs", self.container(service))

    def healthy(self):
        if self.engine == "docker":
            return self.inspect("service", "{{.State.Health.Status}}") == "healthy"
        command = [self.engine, "healthcheck", "run", self.container("service")]  # now, not later
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def wait_until(self, happened, seconds=300):
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.compose("logs")
            time.sleep(0.2)

    def ask(self, path, **options):
        answer = httpx.post(self.url + path, timeout=30, **zero() | options)
        return answer.raise_for_status().json()

    def _labelled(self, *command, **labels):
        labels = {"project": PROJECT, **labels}
        filters = [f"--filter=label=com.docker.compose.{k}={v}" for k, v in labels.items()]
        return run(self.engine, *command, *filters)


def run(*command, **options):
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def works(*command):
    found = shutil.which(command[0])
    return found and subprocess.run(command, check=False, capture_output=True).returncode == 0


def find_tools():
    """Find an engine that runs and its Compose command."""
    if works("docker", "info") and works("docker", "compose", "version"):
        return "docker", ("docker", "compose")
    if works("podman", "info") and works("podman-compose", "version"):
        return "podman", ("podman-compose",)
    return None


@pytest.fixture(scope="module")
def make_stack():
    """Make stacks that leave nothing behind, one after the other."""
    tools, made = find_tools(), []
    if tools is None:
        pytest.skip("neither a Docker engine with Compose runs here nor podman with podman-compose")

    def make(folder):
        made.append(Stack(*tools, folder, free_port()))
        made[-1].compose("down", "--volumes")  # what an interrupted run left
        return made[-1]

    yield make
    for stack in made:
        stack.compose("down", "--volumes")


@pytest.fixture(scope="module")
def stack(make_stack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    shutil.copy(ROOT / "docker-compose.yml", folder)  # no override of whoever works here counts
    if os.environ.get("BUILD") != "no":
        source = Stack(*find_tools(), ROOT, 0)
        source.compose("-f", "docker-compose.yml", "build")
    return make_stack(folder)


def test_a_trainer_that_is_killed_goes_on_where_it_was(stack):
    stack.compose("up", "--detach", "trainer")
    trainer = stack.container("trainer")
    follow = [stack.engine, "logs", "--follow", trainer]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as log:
        assert any(line.startswith("epoch 3/60") for line in log.stdout)
        run(stack.engine, "kill", "--signal", "KILL", trainer)
    stack.wait_until(lambda: stack.inspect("trainer", "{{.State.ExitCode}}") == "137")
    assert "saved" not in stack.log("trainer")

    stack.compose("up", "--detach")
    _, done, rest = re.split(r"epochs done before: (\d+)", stack.log("trainer"))
    assert int(done) >= 3
    resumed = [int(epoch) for epoch in re.findall(r"^epoch (\d+)/60", rest, re.MULTILINE)]
    assert resumed == list(range(int(done) + 1, 61))
    assert "saved /checkpoints/digits-mlp/1" in rest


def test_the_service_is_healthy_and_answers(stack):
    stack.wait_until(stack.healthy)
    (answer,) = stack.ask("/predict")["predictions"]
    assert answer["label"] == "0"
    doubt = stack.ask("/uncertainty?samples=100&seed=1")
    assert doubt["samples"] == 100
    assert doubt["predictions"][0]["label"] == "0"
    assert stack.ask("/uncertainty?samples=100&seed=1") == doubt


def test_it_has_no_privileges_and_writes_nowhere_but_tmp(stack):
    status, folders = json.loads(stack.inside("service", INSIDE))
    assert status["Uid"] == status["Gid"] == ["10001"] * 4
    assert {status[kind][0] for kind in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert status["NoNewPrivs"] == ["1"]
    assert folders == {
        "/": "EROFS",
        "/opt/dropserve": "EROFS",
        "/checkpoints": "EROFS",
        "/tmp": None,  # noqa: S108
    }


def test_the_image_holds_nothing_that_is_never_run(stack):
    sizes = """import os, sysconfig
from pathlib import Path
root = Path(sysconfig.get_path("purelib"))
print(sum(p.lstat().st_blocks for p in root.rglob("*")) * 512 // 10**6)
print(sum((root / "torch" / name).exists() for name in ("test", "include")))"""
    megabytes, left = map(int, stack.inside("service", sizes).split())
    assert megabytes < 950
    assert left == 0


def test_a_service_that_dies_comes_back(stack):
    state = "{{.State.Running}} {{.State.StartedAt}}"
    before = stack.inspect("service", state)
    stack.inside("service", KILL)
    stack.wait_until(lambda: stack.inspect("service", state) != before)
    if stack.engine == "podman":  # restarts nothing that depends on a container that has ended
        stack.compose("up", "--detach")
    stack.wait_until(stack.healthy)
    assert stack.ask("/predict")["predictions"][0]["label"] == "0"


def test_it_stops_within_its_grace_period(stack):
    start = time.monotonic()
    stack.compose("stop", "service")
    assert time.monotonic() - start < int(GRACE.removesuffix("s"))
    assert stack.inspect("service", "{{.State.ExitCode}}") == "0"


def test_a_second_start_finds_the_trained_model(stack):
    stack.compose("down")
    stack.compose("up", "--detach")
    assert "epoch" not in stack.log("trainer")
    assert "digits-mlp has version 1 already" in stack.log("trainer")
    stack.wait_until(stack.healthy)
    assert stack.ask("/predict")["version"] == 1


def test_nothing_is_left_once_the_volumes_are_removed(stack):
    assert stack.volumes()
    stack.compose("down", "--volumes")
    assert stack.volumes() == []
    assert stack.container("service") is None


# docs/deployment.md: models, networks and keys of one's own, as a reader does it

SHELL = """
docker() { shift; {compose} -p {project} "$@"; }
sudo() { "$@"; }
curl() { command curl "${@//127.0.0.1:8000/127.0.0.1:{port}}"; }
"""


@pytest.fixture(scope="module")
def guided(make_stack, tmp_path_factory):
    """A stack with the guide's override, after its commands, and what the last one printed."""
    folder = tmp_path_factory.mktemp("guided")
    shutil.copy(ROOT / "docker-compose.yml", folder)
    for label, image in [("light", 200), ("dark", 50)] * 4:
        place = folder / "photos" / label
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40), image).save(place / f"{len(list(place.iterdir()))}.png")
    folder.chmod(0o755)
    stack = make_stack(folder)
    section = GUIDE.partition("## Your own models")[2].partition("\n## ")[0]
    (override,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (folder / "docker-compose.override.yml").write_text(override)
    shell = SHELL
    for name, value in {
        "compose": " ".join(stack.compose_command),
        "project": PROJECT,
        "port": str(stack.port),
    }.items():
        shell = shell.replace(f"{{{name}}}", value)
    environment = {**os.environ, "DROPSERVE_PORT": str(stack.port)}
    *steps, ask = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    up, ask = ask.splitlines()
    for step in (*steps, up):
        run("bash", "-ec", shell + step, cwd=folder, env=environment)
    stack.wait_until(stack.healthy)
    return stack, json.loads(run("bash", "-ec", shell + ask, cwd=folder, env=environment))


def test_own_networks_and_photos_are_trained_and_served(guided):
    stack, listed = guided
    assert [model["name"] for model in listed["models"]] == ["digits-mlp", "mine", "photos"]
    assert [model["name"] for model in listed["models"] if model["default"]] == ["mine"]
    assert sorted(path.name for path in (stack.folder / "checkpoints").iterdir()) == [
        "digits-mlp",
        "mine",
        "photos",
    ]


def test_requests_must_bring_a_key_and_a_key_that_is_appended_counts(guided):
    stack, _ = guided
    assert httpx.get(f"{stack.url}/v1/models").status_code == 401
    with (stack.folder / "api-keys").open("a") as keys:
        keys.write("appended-later\n")
    headers = {"X-API-Key": "appended-later", "Content-Type": "image/png"}
    stack.wait_until(
        lambda: httpx.get(f"{stack.url}/v1/models", headers=headers).status_code == 200, 30
    )
    assert stack.ask("/predict", headers=headers)["model"] == "mine"


# several workers


@pytest.fixture(scope="module")
def two_workers(make_stack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-workers")
    shutil.copy(ROOT / "docker-compose.yml", folder)
    override = {"services": {"service": {"environment": {"DROPSERVE_WORKERS": "2"}}}}
    (folder / "docker-compose.override.yml").write_text(yaml.safe_dump(override))
    stack = make_stack(folder)
    stack.compose("up", "--detach")
    stack.wait_until(stack.healthy)
    return stack


def test_a_worker_that_the_kernel_kills_for_its_memory_is_replaced(two_workers):
    killed = two_workers.inside("service", OUT_OF_MEMORY).strip()
    assert two_workers.ask("/predict")["predictions"][0]["label"] == "0"
    line = f"worker {killed} died (exit code -9)"
    two_workers.wait_until(lambda: line in two_workers.log("service"), 10)
    two_workers.wait_until(lambda: both_serve(two_workers), 60)
    assert two_workers.inspect("service", "{{.State.Running}} {{.RestartCount}}") == "true 0"


def both_serve(stack):
    metrics = httpx.get(stack.url + "/metrics").text
    return 'dropserve_model_loaded{model="digits-mlp",version="1"} 2.0' in metrics

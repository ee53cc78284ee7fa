"""The wheel, the Dockerfile and the Compose file, run as they stand but without Docker.

The tests read the command lines, environments and the health check from those files, and run them
in an environment that holds the wheel and what it asks for, and nothing else.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import check_jsonschema
import httpx
import jsonschema
import pytest
import typer
import yaml

from dropserve.service.cli.main import app
from dropserve.service.settings import Settings, environment_name
from tests.dockerfile import BUILDER, FINAL, image_environment, last
from tests.helpers import free_port, needed, zero

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = sorted(COMPOSE["services"])
OURS = sorted(name for name in SERVICES if "profiles" not in COMPOSE["services"][name])
THEIRS = sorted(set(SERVICES) - set(OURS))
CONTAINER_PORT = "8000"

# Reading the files


def build_context():
    """List what the builder copies from the source tree."""
    copies = [shlex.split(arguments) for name, arguments in BUILDER if name == "COPY"]
    return [source for *sources, _ in copies for source in sources]


def seconds(duration):
    """Read a Compose duration; the file uses whole seconds alone."""
    assert re.fullmatch(r"\d+s", duration)
    return int(duration[:-1])


# The Compose file


def test_compose_file_follows_the_compose_specification():
    folder = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(COMPOSE)


@pytest.mark.parametrize("name", SERVICES)
def test_container_has_no_privileges_and_bounded_resources(name):
    container = COMPOSE["services"][name]
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert "cap_add" not in container
    assert "privileged" not in container
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["init"] is True
    assert set(container["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    (tmpfs,) = container["tmpfs"]
    assert re.match(r"/tmp:size=\d+m,", tmpfs)  # noqa: S108


@pytest.mark.parametrize(("name", "read_only"), [("trainer", False), ("service", True)])
def test_only_the_trainer_may_write_the_checkpoints(name, read_only):
    volumes = {volume["target"]: volume for volume in COMPOSE["services"][name]["volumes"]}
    assert volumes["/checkpoints"]["source"] == "checkpoints"
    assert volumes["/checkpoints"].get("read_only", False) is read_only


@pytest.mark.parametrize("name", OURS)
def test_volumes_cover_folders_that_the_image_gives_to_its_user(name):
    targets = {volume["target"] for volume in COMPOSE["services"][name]["volumes"]}
    assert targets <= owned_folders()


def owned_folders():
    (command,) = [run for name, run in FINAL if name == "RUN"]
    user, group = last("USER").split(":")
    install = shlex.split(command)
    assert install[:4] == ["install", "--directory", f"--owner={user}", f"--group={group}"]
    return set(install[4:])


def test_service_starts_after_training_succeeded():
    trainer, service = COMPOSE["services"]["trainer"], COMPOSE["services"]["service"]
    assert service["depends_on"] == {"trainer": {"condition": "service_completed_successfully"}}
    assert trainer["restart"] == "no"
    assert service["restart"] == "unless-stopped"


def test_image_is_built_once_and_never_pulled():
    assert {COMPOSE["services"][name]["image"] for name in OURS} == {"dropserve"}
    assert [name for name in SERVICES if "build" in COMPOSE["services"][name]] == ["trainer"]
    assert {COMPOSE["services"][name]["pull_policy"] for name in OURS} == {"never"}


@pytest.mark.parametrize("name", THEIRS)
def test_observers_are_pinned_optional_on_this_machine_only_and_read_their_configuration(name):
    container = COMPOSE["services"][name]
    assert container["profiles"] == ["observability"]
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", container["image"])
    (port,) = container["ports"]
    assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-(\d+)\}:\1", port)
    bound = [volume for volume in container["volumes"] if volume["type"] == "bind"]
    assert bound
    for volume in bound:
        assert volume["read_only"] is True
        assert (ROOT / volume["source"]).exists()
    volumes = {v["source"] for v in container["volumes"] if v["type"] == "volume"}
    assert volumes == {name}
    assert not volumes - COMPOSE["volumes"].keys()
    assert re.search(r"127\.0\.0\.1:\d+/", container["healthcheck"]["test"][-1])


def test_service_is_published_to_this_machine_only():
    (port,) = COMPOSE["services"]["service"]["ports"]
    assert port == f"127.0.0.1:${{DROPSERVE_PORT:-8000}}:{CONTAINER_PORT}"
    assert last("EXPOSE") == CONTAINER_PORT


def test_grace_period_is_longer_than_the_drain():
    service = COMPOSE["services"]["service"]
    drain = int(service["environment"][environment_name("drain_seconds")])
    assert seconds(service["stop_grace_period"]) > drain


def test_health_is_checked_by_the_image_and_only_where_something_is_served():
    assert COMPOSE["services"]["trainer"]["healthcheck"] == {"disable": True}
    assert "healthcheck" not in COMPOSE["services"]["service"]


@pytest.mark.parametrize("name", OURS)
def test_settings_in_the_environment_exist(name):
    known = {environment_name(field) for field in Settings.model_fields}
    environment = image_environment() | COMPOSE["services"][name]["environment"]
    assert {key for key in environment if key.startswith("DROPSERVE_")} <= known


# The Dockerfile


def test_image_runs_as_a_numbered_user_that_is_not_root():
    user, group = (int(number) for number in last("USER").split(":"))
    assert user > 0
    assert group > 0


def test_health_check_gives_up_in_bounded_time():
    options, command = health_check()
    assert "/readyz" in command[-1]
    assert 0 < seconds(options["timeout"]) < seconds(options["interval"])
    assert int(options["retries"]) > 0
    assert seconds(options["start-period"]) > 0


def health_check():
    """Read the options and the command of the image's health check."""
    options, command = last("HEALTHCHECK").split(" CMD ")
    return dict(option[2:].split("=") for option in options.split()), json.loads(command)


def test_final_stage_installs_and_compiles_nothing():
    assert [arguments for name, arguments in FINAL if name == "COPY"] == [
        "--from=builder /opt/dropserve /opt/dropserve"
    ]
    ran = " ".join(arguments for name, arguments in FINAL if name == "RUN")
    assert not re.search(r"\b(apt|apt-get|gcc|pip|curl|wget)\b", ran)


def test_both_stages_run_one_python():
    assert BUILDER[0][1].removesuffix(" AS builder") == FINAL[0][1] == "python:3.11-slim"


def test_build_context_lets_through_what_the_image_copies_and_no_more():
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    of_ray = ["constraints.txt", "deploy/ray"]  # of the Dockerfile in docs/deployment.md
    assert "*" in rules
    passed = sorted(rule[1:] for rule in rules if rule.startswith("!"))
    assert passed == sorted([*build_context(), *of_ray])


def test_commands_exist():
    scripts = project()["scripts"]
    assert json.loads(last("ENTRYPOINT"))[0] in scripts
    named = [json.loads(last("CMD")), *(COMPOSE["services"][name]["command"] for name in OURS)]
    assert {command[0] for command in named} <= set(typer.main.get_command(app).commands)


def test_nothing_is_installed_in_the_image_without_its_hash():
    ran = [arguments for name, arguments in BUILDER if name == "RUN"]
    commands = [
        part for run in ran for part in run.split("&&") if re.search(r"(?<!-)\bpip\b", part)
    ]
    asking = [command for command in commands if "--no-index" not in command]
    assert len(asking) == 2
    for command in asking:
        assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(command.split())
    assert [command.split()[-1] for command in asking] == ["torch.lock", "requirements.lock"]


# The wheel


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **options):
    """Run a command to its end; what it printed is shown if it fails."""
    result = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from what the Dockerfile copies."""
    context, dist = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("dist")
    for source in build_context():
        if (ROOT / source).is_dir():
            skip = shutil.ignore_patterns("__pycache__")  # as .dockerignore does
            shutil.copytree(ROOT / source, context / source, symlinks=True, ignore=skip)
        else:
            shutil.copyfile(ROOT / source, context / source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, context)
    (path,) = dist.iterdir()
    return path


def test_wheel_holds_the_packages_whole_without_results_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"dropserve-{project()['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"dropserve", metadata}
    assert {name for name in names if not name.startswith(metadata)} == set(package_files())


def package_files():
    yield "dropserve/__init__.py"
    for pattern in ("models/**/*", "service/**/*", "lab/*.py", "lab/experiments/*.py"):
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix != ".pyc":
                yield f"dropserve/{path.relative_to(ROOT).as_posix()}"


# The containers, without the containers


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Install the wheel where what it asks for can be imported, and nothing else.

    Dependencies are linked from the environment at hand, which has the constraints' versions, as
    another test sees to: pip would fetch and unpack a gigabyte for the same outcome.
    """
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for distribution in needed(project()["dependencies"]):
        for name in top_level(distribution):
            if not (packages / name).exists():  # several may share a namespace
                (packages / name).symlink_to(distribution.locate_file(name))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(*pip, "check")
    return folder


def top_level(distribution):
    """Name a distribution's files and folders in site-packages; its scripts lie elsewhere."""
    return {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}


@dataclass(frozen=True)
class Containers:
    """The Compose file's services as processes, in folders that stand for the containers'."""

    installed: Path
    home: Path
    port: str

    @property
    def checkpoints(self):
        return self.home / "checkpoints"

    def command(self, name):
        return [*json.loads(last("ENTRYPOINT")), *COMPOSE["services"][name]["command"]]

    def options(self, name):
        """Give the process its environment, with this machine's folders for the image's."""
        folders = {"/opt/dropserve": self.installed, "/tmp": self.home}  # noqa: S108
        folders |= {folder: self.home / folder[1:] for folder in owned_folders()}
        pattern = re.compile("|".join(map(re.escape, folders)))
        environment = {
            key: pattern.sub(lambda found: str(folders[found[0]]), value)
            for key, value in (
                image_environment() | COMPOSE["services"][name]["environment"]
            ).items()
        }
        environment[environment_name("port")] = self.port
        return {"env": environment, "cwd": self.home}

    def train(self):
        return run(*self.command("trainer"), **self.options("trainer"))

    def healthy(self):
        options, command = health_check()
        done = subprocess.run(
            command,
            check=False,
            stderr=subprocess.DEVNULL,
            timeout=seconds(options["timeout"]),
            **self.options("service"),
        )
        return done.returncode == 0

    def files(self):
        """List every checkpoint's files and folders, with sizes and times of change."""
        stats = {path: path.stat() for path in self.checkpoints.rglob("*")}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture(scope="module")
def containers(installed, tmp_path_factory):
    """Make empty volumes and run the trainer over them."""
    containers = Containers(installed, tmp_path_factory.mktemp("volumes"), str(free_port()))
    containers.checkpoints.mkdir()
    containers.train()
    return containers


@dataclass(frozen=True)
class Served:
    """What the service did between its start and its end."""

    answer: httpx.Response
    files_before: dict
    files_after: dict
    seconds_to_end: float
    exit_code: int
    log: str


@pytest.fixture(scope="module")
def served(containers):
    """Run the service: wait until it is healthy, ask it for a digit, end it by SIGTERM."""
    grace = seconds(COMPOSE["services"]["service"]["stop_grace_period"])
    log_path = containers.home / "dropserve.service.log"
    before = containers.files()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            containers.command("service"), stdout=log, stderr=log, **containers.options("service")
        )
    try:
        wait_until_healthy(containers, process, log_path)
        answer = httpx.post(f"http://127.0.0.1:{containers.port}/predict", **zero())
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        exit_code = process.wait(timeout=grace)
        ended = time.monotonic() - start
    finally:
        process.kill()
        process.wait()
    return Served(answer, before, containers.files(), ended, exit_code, log_path.read_text())


def wait_until_healthy(containers, process, log_path):
    options, _ = health_check()
    patience = int(options["retries"]) * seconds(options["interval"])
    deadline = time.monotonic() + seconds(options["start-period"]) + patience
    while not containers.healthy():
        assert process.poll() is None, log_path.read_text()
        assert time.monotonic() < deadline, log_path.read_text()


def test_trainer_writes_one_version(containers):
    assert [path.name for path in containers.checkpoints.glob("*/*")] == ["1"]


def test_trainer_leaves_a_trained_model_alone(containers):
    before = containers.files()
    containers.train()
    assert containers.files() == before


def test_service_classifies_a_digit(served):
    assert served.answer.status_code == 200, served.log
    assert served.answer.json()["version"] == 1
    assert [p["label"] for p in served.answer.json()["predictions"]] == ["0"]


def test_service_writes_nothing_to_the_checkpoints(served):
    assert served.files_after == served.files_before


def test_service_ends_cleanly_on_sigterm_before_it_is_killed(served):
    assert served.exit_code == 0, served.log
    # Nothing was open, so nothing had to be drained.
    drain = int(COMPOSE["services"]["service"]["environment"][environment_name("drain_seconds")])
    assert served.seconds_to_end < drain

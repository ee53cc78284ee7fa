"""The whole command line: serving, settings, help, completion, and what is not imported."""

import json
import os
import platform
import pty
import re
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dropserve.service.cli import main
from dropserve.service.cli.terminal import Refused
from dropserve.service.settings import Settings, environment_name
from tests.helpers import free_port

DROPSERVE = Path(sys.executable).with_name("dropserve")


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])  # noqa: S104  not bound
def test_a_port_that_is_taken_is_refused_by_its_name(taken, host):
    with pytest.raises(Refused, match=f"{host}:{taken} is in use.*--port"):
        main.check_free(host, taken)


def test_a_free_port_and_any_port_are_fine():
    main.check_free("127.0.0.1", 0)
    main.check_free("127.0.0.1", free_port())


def test_an_address_that_is_none_is_refused():
    with pytest.raises(Refused, match=r"is called no\.such\.host\.invalid: "):
        main.check_free("no.such.host.invalid", 80)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),  # noqa: S104  not bound
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("here.test", "http://here.test:8000"),
    ],
)
def test_a_client_on_this_machine_finds_the_service_at_its_url(host, url):
    assert Settings(host=host).url == url


def test_a_taken_port_is_a_line_before_anything_is_loaded(taken, checkpoints):
    command = [DROPSERVE, "serve", "--port", str(taken), "--checkpoints", checkpoints]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"error: 127\.0\.0\.1:{taken} is in use .*\n", done.stderr)


def test_a_person_is_told_when_it_is_ready_and_where(checkpoints):
    port = free_port()
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DROPSERVE_")}
    environment |= {"DROPSERVE_DEFAULT_MODEL": "digits-mlp", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [DROPSERVE, "serve", "--port", str(port), "--checkpoints", checkpoints],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=environment,
    ) as server:
        os.close(theirs)
        told = b""
        while not told.endswith(b"\n"):
            told += os.read(ours, 4096)
        server.send_signal(signal.SIGTERM)
    os.close(ours)
    assert server.returncode == 0
    assert told.decode().strip() == (
        f"ready: http://127.0.0.1:{port} serves colour-cnn 1, digits-mlp 2; Ctrl-C stops it"
    )


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({}, 2, ": no checkpoint in it"),
        ({"API_KEYS_FILE": os.devnull, "WORKERS": "2"}, 1, "no file of API keys"),
    ],
    ids=["no checkpoint", "no key"],
)
def test_serve_says_what_it_lacks(tmp_path, checkpoints, given, code, said):
    # In a process of its own, because serving takes over the process's logging.
    command = [DROPSERVE, "serve", "--checkpoints", checkpoints if given else tmp_path]
    given = given | {"DEFAULT_MODEL": "digits-mlp", "PORT": "0"}
    environment = os.environ | {f"DROPSERVE_{name}": value for name, value in given.items()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_lists_every_variable_with_default_value_and_meaning(run):
    table = run("settings", DROPSERVE_MAX_SIDE="77").stdout
    rows = json.loads(run("settings", "--json", DROPSERVE_MAX_SIDE="77").stdout)
    assert [row["variable"] for row in rows] == list(map(environment_name, Settings.model_fields))
    assert all(row["variable"] in table for row in rows)
    (row,) = [row for row in rows if row["variable"] == "DROPSERVE_MAX_SIDE"]
    meaning = Settings.model_fields["max_side"].description
    assert list(row.values()) == ["DROPSERVE_MAX_SIDE", 16384, 77, meaning]


@pytest.mark.parametrize(
    ("command", "variable", "value", "message"),
    [
        ("settings", "PORT", "abc", "must be a valid integer"),
        ("serve", "PORT", "65536", "must be less than or equal to 65535"),
        ("train", "POLL_SECONDS", "0", "must be greater than 0"),
        ("settings", "POLL_SECONDS", "soon", "must be a valid number"),
        ("settings", "ADMIN_TOKEN", "short", "must have at least 16 characters"),
        ("settings", "TRACING", "maybe", "must be a valid boolean"),
        ("settings", "PRECISION", "float16", "must be 'float32', 'bfloat16' or 'auto'"),
        ("settings", "MAX_WAIT", "inf", "must be a finite number"),
    ],
)
def test_an_invalid_setting_is_named_but_not_repeated(run, command, variable, value, message):
    result = run(command, **{f"DROPSERVE_{variable}": value})
    assert (result.exit_code, result.stderr) == (2, f"error: DROPSERVE_{variable}: {message}\n")


def test_memory_for_bodies_that_one_body_overflows_is_refused(run):
    result = run("settings", DROPSERVE_MAX_HELD_BYTES="1048576")
    assert result.exit_code == 2
    assert "DROPSERVE_MAX_HELD_BYTES must be at least DROPSERVE_MAX_BODY_BYTES" in result.stderr


def test_version_says_which_release_of_what_this_is(run):
    told = run("--version").stdout
    assert told == (
        f"dropserve {version('dropserve')} (Python {platform.python_version()}, "
        f"PyTorch {version('torch')})\n"
    )


@pytest.mark.parametrize("command", ["train", "import", "evaluate", "uncertainty", "score", ""])
def test_flags_have_no_type_in_the_help(run, command):
    told = run(*[command] * bool(command), "--help").stdout
    assert "--help" in told
    assert "bool" not in told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_had_for_a_shell(shell):
    command = [DROPSERVE, "--show-completion", shell]
    named = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # by its argument
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=named)
    assert "_DROPSERVE_COMPLETE" in done.stdout


@pytest.mark.parametrize("command", ["train", "score", "watch", "uncertainty"])
def test_help_leaves_room_to_read_on_a_narrow_terminal(run, command):
    lines = run(command, "--help", COLUMNS="80").stdout.splitlines()
    options = [line for line in lines if line.startswith("│ ") and "--" in line]
    assert options
    assert max(map(len, lines)) <= 80
    assert all(len(line) - line.index("  ", 5) > 40 for line in options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--help"],
        ["score", "--help"],
        ["settings"],
        ["watch", "--once", "--url", "http://127.0.0.1:1"],
        ["pin", "digits-mlp", "latest"],
    ],
)
def test_commands_that_load_no_model_import_no_torch(arguments, checkpoints, monkeypatch):
    monkeypatch.setenv(environment_name("checkpoints"), str(checkpoints))
    code = (
        "import sys; from dropserve.service.cli.main import app; app(standalone_mode=False);"
        "assert not {'torch', 'numpy', 'fastapi'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True)

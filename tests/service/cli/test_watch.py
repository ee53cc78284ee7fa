"""`dropserve watch`: what the metrics say of the last seconds, and how it is shown."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections import deque
from itertools import islice

import httpx
import pytest
from rich.console import Console

from dropserve.service import errors
from dropserve.service.cli import watch
from dropserve.service.cli.watch import Snapshot, between, quantile
from dropserve.service.client import DropserveClient
from dropserve.service.schemas import Readiness
from tests.helpers import PNG, eventually

READY = {
    "status": "ready",
    "models": {
        "a": {"version": 3, "versions": [3, 2], "refused": [{"version": 4, "reason": "damaged"}]}
    },
}


def snapshot(at, requests=0, failed=0, fast=0, slow=0, label_sum=0.0, ready=READY):
    """Metrics of a model `a`: so many durations of up to 10 ms and of up to 100 ms."""
    task = 'model="a",task="predict"'
    labels = 'route="/predict",model="a",status="200"'
    text = f"""
# TYPE dropserve_requests_total counter
dropserve_requests_total{{route="/predict",model="a",version="3",status="200"}} {requests}
dropserve_requests_total{{route="/predict",model="",version="",status="503"}} {failed}
dropserve_requests_total{{route="/metrics",model="",version="",status="200"}} {at * 100}
dropserve_requests_total{{route="/v2/health/live",model="",version="",status="200"}} {at * 10}
dropserve_requests_total{{route="/v2/health/ready",model="",version="",status="503"}} {at * 10}
# TYPE dropserve_request_duration_seconds histogram
dropserve_request_duration_seconds_bucket{{{labels},le="0.01"}} {fast}
dropserve_request_duration_seconds_bucket{{{labels},le="0.1"}} {fast + slow}
dropserve_request_duration_seconds_bucket{{{labels},le="+Inf"}} {fast + slow}
dropserve_request_duration_seconds_sum{{{labels}}} 1
dropserve_request_duration_seconds_count{{{labels}}} {fast + slow}
# TYPE dropserve_confidence histogram
dropserve_confidence_bucket{{{task},le="+Inf"}} {requests}
dropserve_confidence_sum{{{task}}} {label_sum}
dropserve_confidence_count{{{task}}} {requests}
# TYPE dropserve_queue_images gauge
dropserve_queue_images 7
# TYPE dropserve_workers gauge
dropserve_workers 2
"""
    return Snapshot(text, Readiness.model_validate(ready), float(at))


def test_figures_are_of_what_happened_between_two_snapshots():
    before = snapshot(0, requests=100, fast=50, slow=50, label_sum=90)
    found = between(before, snapshot(2, requests=200, failed=4, fast=140, slow=60, label_sum=170))
    assert found == {
        "seconds": 2.0,
        "workers": 2,
        "requests": 52.0,
        "errors": 2.0,
        "p50": pytest.approx(0.01 * 50 / 90),
        "p99": pytest.approx(0.01 + 0.09 * 9 / 10),
        "queue": 7,
        "batch": None,
        "samples": 0.0,
        "models": {
            "a": {
                "version": 3,
                "others": [2],
                "refused": [4],
                "requests": 50.0,
                "confidence": pytest.approx(0.8),
                "mutual_information": None,
            }
        },
    }


def test_a_service_that_was_started_again_counts_from_nothing():
    found = between(snapshot(0, requests=1000, fast=900), snapshot(1, requests=10, fast=10))
    assert found["requests"] == 10.0
    assert found["p50"] is None or found["p50"] >= 0


@pytest.mark.parametrize(
    ("below", "expected"),
    [
        ({}, None),
        ({1.0: 0, float("inf"): 0}, None),
        ({1.0: 0, 2.0: 10, float("inf"): 10}, 1.5),
        ({1.0: 5, 2.0: 10, float("inf"): 10}, 1.0),
        ({1.0: 1, float("inf"): 10}, 1.0),
    ],
)
def test_a_quantile_lies_within_its_bucket(below, expected):
    assert quantile(0.5, below) == expected


def test_what_is_no_metrics_is_refused():
    with pytest.raises(ValueError):  # noqa: PT011  the parser's own words
        Snapshot("<html>{", Readiness.model_validate(READY), 0.0)


FIGURES = between(snapshot(0), snapshot(1, requests=10, failed=1, fast=10, label_sum=9))


def drawn(now, width=80):
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    screen.print(watch.draw(now, deque([5.0, 10.0]), "http://a.test"))
    return screen.file.getvalue()


def test_the_view_names_models_versions_and_uncertainty():
    text = drawn(FIGURES)
    assert "http://a.test  ready  2 workers" in text
    assert "11.0/s" in text
    assert "▄▇█" in text
    words = " ".join(text.split())
    assert "a 3 2 4 10.0/s 90.0% -" in words
    assert max(map(len, text.splitlines())) <= 80


def test_the_view_says_why_there_is_nothing_to_see():
    assert "http://a.test  no answer\ngone" in drawn(errors.Unreachable("gone"))


def test_a_line_is_one_line_whatever_is_missing():
    assert watch.line(FIGURES) == (
        "11.0 requests/s, p50 5.0 ms, p99 9.9 ms, 1.0 errors/s, queue 7, batch -; "
        "a 3: confidence 90.0%, mutual information -, refused 4"
    )


def answers(*given):
    """A client whose service answers /metrics with each of these in turn, an error raised."""
    left = list(given)

    def handle(request):
        if request.url.path == "/readyz":
            return httpx.Response(200, json={"status": "ready", "models": {}})
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, content = answer
        return httpx.Response(status, content=content)

    return DropserveClient(transport=httpx.MockTransport(handle), retries=0)


def test_after_an_outage_figures_begin_anew():
    page = (200, b"dropserve_workers 1\n")
    gone = httpx.ConnectError("gone")
    times = iter(range(9))
    with answers(page, page, gone, (503, b""), page, page) as client:
        seen = watch.watch_figures(client, 1.0, lambda _: None, lambda: float(next(times)))
        kinds = [type(now) for now in islice(seen, 4)]
    assert kinds == [dict, errors.Unreachable, errors.Overloaded, dict]


@pytest.mark.parametrize(
    ("answer", "error"),
    [((401, b""), errors.RequestError), ((200, b"<html>{"), errors.ServerError)],
)
def test_a_service_that_will_not_say_is_no_reason_to_wait(answer, error):
    with answers(answer) as client, pytest.raises(error):
        next(watch.watch_figures(client, 1.0, lambda _: None))


@pytest.fixture
def asked(server):
    """The address of a server that is asked something several times a second, meanwhile."""
    program = (
        "import sys, time; from dropserve.service.client import DropserveClient\n"
        "image = sys.stdin.buffer.read()\n"
        "with DropserveClient(sys.argv[1]) as client:\n"
        "    while True: client.uncertainty(image, samples=10); time.sleep(.02)"
    )
    command = [sys.executable, "-c", program, server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as traffic:
        traffic.stdin.write(PNG)
        traffic.stdin.close()
        with DropserveClient(server.url) as client:
            counted = 'dropserve_mutual_information_nats_count{model="digits-mlp"}'
            eventually(lambda: counted in client.metrics())
        yield server.url
        traffic.kill()


def test_once_says_what_happens_now_in_a_line_or_json(run, asked):
    result = run("watch", "--url", asked, "--once", "--interval", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    result = run("watch", "--url", asked, "--once", "--json", "--interval", "1")
    told = json.loads(result.stdout)
    assert set(told) == set(FIGURES)
    assert told["requests"] > 1
    assert 0 < told["p50"] <= told["p99"] < 10
    model = told["models"]["digits-mlp"]
    assert (model["version"], model["others"], model["refused"]) == (2, [1], [])
    assert 0.1 < model["confidence"] <= 1
    assert 0 <= model["mutual_information"] < 3


def test_a_terminal_shows_a_view_that_ctrl_c_leaves(program, asked):
    ours, theirs = pty.openpty()
    command = [*program, "watch", "--url", asked, "--interval", "0.2"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as run:
        os.close(theirs)
        shown = b""
        while shown.count(b"Ctrl-C leaves") < 3:
            shown += os.read(ours, 65536)
        run.send_signal(signal.SIGINT)
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # the other side is closed
            pass
    os.close(ours)
    assert run.returncode == 0
    assert b"digits-mlp" in shown
    assert b"Traceback" not in shown


@pytest.mark.parametrize(("options", "start"), [([], "no answer: "), (["--json"], '{"error": "')])
def test_where_nobody_watches_it_is_a_line_an_interval_until_ctrl_c(program, options, start):
    command = [*program, "watch", "--url", "http://127.0.0.1:1", "--interval", "0.1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        lines = [run.stdout.readline() for _ in range(2)]
        run.send_signal(signal.SIGINT)
    assert all(line.startswith(start + "no answer from http://127.0.0.1:1 (") for line in lines)
    assert run.returncode == 0

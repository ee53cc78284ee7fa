"""/metrics of real servers, after requests that we know; and the parts it is made of."""

import asyncio
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType, SimpleNamespace

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dropserve.service.inference.batcher import Batcher
from dropserve.service.observability.metrics import (
    REASONS,
    SECONDS,
    Metrics,
    _Buffer,
    _Histogram,
    _remove_dead,
)
from tests.helpers import encode, eventually, noise, workers


def png(seed=0):
    return encode(noise(8, 8, seed=seed))


def post(client, path, content=None):
    return client.post(path, content=content or png(), headers={"content-type": "image/png"})


class Scrape:
    """What /metrics says, read by Prometheus' own parser."""

    def __init__(self, url):
        answer = httpx.get(url + "/metrics", timeout=30)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        self.families = {f.name: f for f in text_string_to_metric_families(answer.text)}
        self.samples = defaultdict(dict)
        for family in self.families.values():
            for sample in family.samples:
                key = frozenset(sample.labels.items())
                assert key not in self.samples[sample.name]
                self.samples[sample.name][key] = sample.value

    def __call__(self, name, **labels):
        """Sum what has these labels."""
        wanted = labels.items()
        return sum(
            value for key, value in self.samples[name].items() if wanted <= dict(key).items()
        )

    def values(self, name, label):
        return {dict(key)[label] for key in self.samples[name]}


@pytest.fixture(scope="module")
def fresh(make_server):
    return make_server(max_queue=4, body_timeout=5).start()


def test_what_is_asked_is_counted_by_route_model_version_and_status(fresh):
    with httpx.Client(base_url=fresh.url, timeout=30) as client:
        before = Scrape(fresh.url)
        for _ in range(3):
            assert post(client, "/predict").status_code == 200
        assert post(client, "/v1/models/digits-mlp/versions/1/predict").status_code == 200
        assert post(client, "/predict", b"nothing").status_code == 415
        for name in ("a", "b", "c"):
            assert post(client, f"/v1/models/{name}/predict").status_code == 404
            assert client.get(f"/{name}").status_code == 404
        after = Scrape(fresh.url)

    def moved(**labels):
        return after("dropserve_requests_total", **labels) - before(
            "dropserve_requests_total", **labels
        )

    assert moved(route="/predict", model="digits-mlp", version="2", status="200") == 3
    assert moved(route="/predict", model="digits-mlp", version="2", status="415") == 1
    route = "/v1/models/{name}/versions/{version}/predict"
    assert moved(route=route, model="digits-mlp", version="1", status="200") == 1
    assert moved(route="/v1/models/{name}/predict", model="", version="", status="404") == 3
    assert moved(route="other", status="404") == 3
    assert moved(route="/metrics", status="200") == 1
    assert after.values("dropserve_requests_total", "model") == {"", "digits-mlp"}
    seconds = "dropserve_request_duration_seconds"
    assert after(seconds + "_count") == after("dropserve_requests_total")
    bounds = {float(b) for b in after.values(seconds + "_bucket", "le")}
    assert bounds == {*SECONDS, float("inf")}
    assert 0 < after(seconds + "_sum", route="/predict", status="200") < 30


def test_answers_are_counted_by_how_sure_they_are(fresh):
    with httpx.Client(base_url=fresh.url, timeout=30) as client:
        before = Scrape(fresh.url)
        sure = [
            post(client, "/predict", png(k)).json()["predictions"][0]["probability"]
            for k in range(5)
        ]
        drawn = [
            post(client, "/uncertainty?samples=20", png(k)).json()["predictions"][0]
            for k in range(3)
        ]
        after = Scrape(fresh.url)

    def moved(name, **labels):
        return after("dropserve_" + name, **labels) - before("dropserve_" + name, **labels)

    digits = {"model": "digits-mlp"}
    assert moved("confidence_count", **digits, task="predict") == 5
    assert moved("confidence_sum", **digits, task="predict") == pytest.approx(sum(sure))
    for bound in (0.2, 0.5, 0.9):
        counted = moved("confidence_bucket", **digits, task="predict", le=str(bound))
        assert counted == sum(p <= bound for p in sure)
    assert moved("confidence_sum", **digits, task="uncertainty") == pytest.approx(
        sum(max(p["mean"]) for p in drawn)
    )
    assert moved("mutual_information_nats_count", **digits) == 3
    assert moved("mutual_information_nats_sum", **digits) == pytest.approx(
        sum(p["mutual_information"] for p in drawn), abs=1e-6
    )
    assert moved("samples_total", **digits) == 60
    for task, batches in (("predict", 5), ("uncertainty", 3)):
        assert moved("batch_images_count", task=task) == batches
        assert moved("batch_images_sum", task=task) == batches
        assert moved("queue_wait_seconds_count", task=task) == batches


def test_the_state_of_the_models_is_told(fresh):
    scrape = Scrape(fresh.url)
    assert scrape("dropserve_model_loaded", model="digits-mlp", version="1") == 1
    assert scrape("dropserve_model_loads_total", model="digits-mlp", result="loaded") == 2
    assert len(scrape.samples["dropserve_info"]) == 1


def test_shed_requests_are_counted_and_logged_by_reason(fresh):
    before = Scrape(fresh.url)
    assert before.values("dropserve_shed_total", "reason") == set(REASONS)
    pixels = {"instances": [[[7] * 16] * 16] * 32}
    with httpx.Client(base_url=fresh.url, timeout=60) as client, ThreadPoolExecutor(8) as threads:

        def work(seed):
            path = f"/v1/models/colour-cnn/uncertainty?samples=300&seed={seed}"
            return client.post(path, json=pixels)

        answers = list(threads.map(work, range(8)))
    after = Scrape(fresh.url)
    shed = [answer for answer in answers if answer.status_code == 503]
    assert 0 < len(shed) < 8
    logged = Counter(fresh.line(answer.headers["x-request-id"])["reason"] for answer in shed)
    assert set(logged) <= {"queue", "decode"}
    for reason in REASONS:
        old, new = (scrape("dropserve_shed_total", reason=reason) for scrape in (before, after))
        assert new - old == logged[reason]


def test_clients_that_go_are_counted(fresh):
    before = Scrape(fresh.url)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", fresh.port)) as connection:
            connection.sendall(head)
            time.sleep(0.1)
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    after = settled(fresh, lambda s: s("dropserve_requests_total", status="499") == 2)
    assert after("dropserve_cancelled_total") - before("dropserve_cancelled_total") == 2


def settled(server, condition):
    """Scrape until a condition holds: other workers lag half a second, a new one loads models."""

    def holds():
        scrape = Scrape(server.url)
        return scrape if condition(scrape) else None

    return eventually(holds, 50)


def test_two_workers_add_up_and_a_dead_ones_gauges_go(make_server):
    server = make_server(workers=2).start()
    sent = 0
    with ThreadPoolExecutor(8) as threads:

        def work(_):
            with httpx.Client(base_url=server.url, timeout=30) as client:
                return sum(post(client, "/predict", png(k)).status_code == 200 for k in range(25))

        load = threads.map(work, range(16))
        for _ in range(5):
            Scrape(server.url)  # parses under load
        sent = sum(load)
    assert sent == 400

    scrape = settled(server, lambda s: s("dropserve_requests_total", route="/predict") >= sent)
    assert scrape("dropserve_requests_total", route="/predict", status="200") == sent
    assert scrape("dropserve_confidence_count", task="predict") == sent
    assert scrape("dropserve_batch_images_sum", task="predict") == sent
    assert scrape("dropserve_request_duration_seconds_count", route="/predict") == sent
    assert scrape("dropserve_workers") == 2
    assert scrape("dropserve_model_loaded", model="digits-mlp", version="2") == 2
    assert scrape("dropserve_model_version", model="digits-mlp") == 2

    os.kill(workers(server)[0], signal.SIGKILL)
    scrape = settled(server, lambda s: s("dropserve_workers") == 1)
    assert scrape("dropserve_model_loaded", model="digits-mlp", version="2") == 1
    assert scrape("dropserve_requests_total", route="/predict", status="200") == sent
    scrape = settled(server, lambda s: s("dropserve_workers") == 2)
    assert scrape("dropserve_requests_total", route="/predict", status="200") == sent


def test_files_that_workers_have_made_and_not_written_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    empty, gone, written = (tmp_path / f"counter_{2**22 + n}.db" for n in range(3))
    empty.touch()
    gone.symlink_to("nowhere")  # listed, and no more there when it is looked at
    file = MmapedDict(str(written))
    file.write_value(mmap_key("seen", "seen_total", (), (), "Seen."), 3.0, 0.0)
    file.close()
    metrics = Metrics()
    assert b"seen_total 3.0\n" in metrics.write("")[0]


def test_scrapes_at_once_do_not_trip_over_a_dead_worker(tmp_path):
    dead = [2**22 + n for n in range(200)]  # beyond any process id
    for process in dead:
        (tmp_path / f"gauge_livesum_{process}.db").touch()
    together = threading.Barrier(4)

    def scrape(_):
        together.wait(10)
        _remove_dead(tmp_path)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(scrape, range(4)))
    assert not list(tmp_path.iterdir())


def test_open_metrics_are_written_for_who_asks_for_them(fresh):
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = httpx.get(fresh.url + "/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {f.name for f in openmetrics.text_string_to_metric_families(answer.text)}
    assert "dropserve_requests" in names


class Store(dict):
    """Versions that are served, by model."""

    loads = MappingProxyType({("a", "loaded"): 2})
    problem = None
    models = dict.keys
    versions = dict.__getitem__

    def state(self, name):
        version = max(self.get(name, ()), default=None)
        return {
            "version": version,
            "on_request": [],
            "changed": [],
            "pin_problem": None,
        }

    def count_refused(self, _name):
        return 1


def test_gauges_follow_what_is_served_and_loads_are_counted_once():
    metrics, store = Metrics(), Store(a=[1])
    source = SimpleNamespace(queued=7, store=store)
    metrics.flush(source)
    del store["a"]
    for _ in range(2):
        metrics.flush(source)
    text = metrics.write("")[0].decode()
    for line in (
        "queue_images 7.0",
        'model_loaded{model="a",version="1"} 0.0',
        'model_version{model="a"} 0.0',
        'model_refused_versions{model="a"} 1.0',
        'model_loads_total{model="a",result="loaded"} 2.0',
    ):
        assert f"\ndropserve_{line}\n" in text


def test_two_applications_in_a_process_count_apart():
    one, other = Metrics(), Metrics()
    one.record_request("/predict", "m", 1, 200, 0.1)
    assert list(one.requests) == [("/predict", "m", 1, 200)]
    assert not other.requests


def test_many_values_at_once_count_as_one_by_one():
    bounds = (0.1, 0.2, 0.5)
    together, single = (
        _Histogram("x", "x", buckets=bounds, registry=CollectorRegistry()) for _ in range(2)
    )
    values = [0, 0.1, 0.10001, 0.2, 0.3, 0.5, 0.6, 99]
    together.observe_all(values)
    for value in values:
        single.observe(value)

    def counts(histogram):
        (family,) = histogram.collect()
        return {
            (s.name, s.labels.get("le")): pytest.approx(s.value)
            for s in family.samples
            if not s.name.endswith("_created")
        }

    assert counts(together) == counts(single)


def test_no_event_is_lost_between_two_threads():
    events, seen = _Buffer(), 0
    with ThreadPoolExecutor(1) as other:

        def note():
            for n in range(20_000):
                events[(str(n % 3),)].append(1.0)

        noting = other.submit(note)
        while not noting.done():
            seen += sum(len(values) for _, values in events.drain())
    seen += sum(len(values) for _, values in events.drain())
    assert seen == 20_000


def test_the_batcher_tells_each_batch_and_how_long_it_waited():
    told = []

    def run(_key, items):
        time.sleep(0.05)
        yield from ()
        return items

    async def main(executor):
        batcher = Batcher(
            run, executor, max_batch=4, max_queue=8, observe=lambda *batch: told.append(batch)
        )
        first = asyncio.create_task(batcher.submit("a", 0))
        await asyncio.sleep(0.01)
        rest = [asyncio.create_task(batcher.submit("a", n, 2)) for n in (1, 2, 3)]
        await asyncio.sleep(0.01)
        assert batcher.queued == 6
        await asyncio.gather(first, *rest)
        assert batcher.queued == 0

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(main(executor))
    assert [(key, weight, len(waits)) for key, weight, waits in told] == [
        ("a", 1, 1),
        ("a", 4, 2),
        ("a", 2, 1),
    ]
    assert max(told[0][2]) < 0.03 <= min(told[1][2])
    assert min(told[2][2]) > 0.05

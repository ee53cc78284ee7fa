"""Versions in object storage: an S3 server over HTTP, behind a proxy that fails as networks do."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from datetime import timedelta

import httpx
import pytest
import torch

from dropserve.models import bucket, checkpoint, object_storage
from dropserve.models.bucket import Bucket
from dropserve.models.errors import (
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointNotWritten,
    CheckpointRefused,
    StorageUnavailable,
)
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from tests.storage import URL

NETWORK = NetworkConfig("mlp", (1, 4, 4), 3, (8,), (0.5,))
ABOUT = checkpoint.Metadata(
    "net", NETWORK, Preprocessing((4, 4), 1, (0.3,), (0.4,)), ("a", "b", "c")
)
LIMIT = 2**20


def module(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORK.build()


def weights(version):
    return {name: tensor.tolist() for name, tensor in version.tensors.items()}


def expected(seed):
    return {name: tensor.tolist() for name, tensor in module(seed).state_dict().items()}


@pytest.fixture(autouse=True)
def _quick(monkeypatch, storage):
    monkeypatch.setattr(bucket, "_RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(object_storage, "_RETRIES", 1)
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def open_bucket(tmp_path):
    def open_(name="cache", limit=LIMIT, **options):
        return Bucket(URL, tmp_path / name, limit, **options)

    return open_


def on(method, path, fault):
    """Have a fault at requests of one method, of paths that contain a text."""
    return lambda had, asked: fault if had == method and path in asked else None


def test_what_is_published_is_read_by_another_machine(open_bucket, storage):
    writer, reader = open_bucket("a"), open_bucket("b")
    assert reader.find() == {}
    assert [writer.save(module(seed), ABOUT) for seed in (1, 2)] == [1, 2]
    assert reader.find() == {"net": [1, 2]}
    for version in (1, 2):
        assert weights(reader.read("net", version)) == expected(version)
    puts = [path.rpartition("/")[2] for path in storage.asked("PUT")]
    assert [name.partition("?")[0] for name in puts] == [
        "model.json", "model.safetensors", "manifest.json",
    ] * 2  # fmt: skip
    writer.pin("net", 1)
    reader.find()
    assert (reader.pinned("net"), writer.remove("net", 1)) == (1, False)
    writer.pin("net", None)
    assert writer.remove("net", 1)
    reader.find()
    assert (reader.pinned("net"), reader.versions("net")) == (None, [2])
    with pytest.raises(CheckpointNotFound, match="no version 1 of 'net' in s3://models/prod"):
        reader.choose("net", 1)


def test_a_poll_is_one_listing_and_what_is_cached_is_not_read_again(open_bucket, storage):
    writer = open_bucket("a")
    for seed in range(3):
        writer.save(module(seed), ABOUT)
    writer.pin("net", 2)
    reader = open_bucket("b")
    reader.find()
    reader.read("net", 3)
    assert reader.pinned("net") == 2
    storage.requests.clear()
    for _ in range(5):
        reader.find()
        assert reader.pinned("net") == 2
        reader.read("net", 3)
        reader.mark("net", 3)
    assert [method for method, path in storage.requests if "list-type=2" in path] == ["GET"] * 5
    assert len(storage.requests) == 5


def test_publishers_that_race_get_a_number_each(open_bucket):
    start, numbers, modules = threading.Barrier(4), {}, [module(seed) for seed in range(4)]

    def publish(seed):
        made = open_bucket(f"cache-{seed}")
        start.wait()
        numbers[seed] = made.save(modules[seed], ABOUT)

    threads = [threading.Thread(target=publish, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers.values()) == [1, 2, 3, 4]
    reader = open_bucket()
    assert all(weights(reader.read("net", n)) == expected(seed) for seed, n in numbers.items())


@pytest.mark.parametrize("file", ["model.json", "model.safetensors", "manifest.json"])
def test_an_upload_that_breaks_leaves_nothing_that_is_read(open_bucket, storage, file, monkeypatch):
    made = open_bucket()
    made.save(module(1), ABOUT)
    storage.fault = on("PUT", file, "down")
    with pytest.raises(CheckpointNotWritten, match=rf"prod/net/2/{file}: cannot be written"):
        made.save(module(2), ABOUT)
    storage.fault = lambda *_: None
    reader = open_bucket("b")
    reader.find()
    assert (reader.versions("net"), reader.choose("net")) == ([1], 1)
    left = file != "model.json"
    if left:
        before = reader.mark("net", 2)
        with pytest.raises(CheckpointIncomplete, match=r"net/2: incomplete: no .*manifest.json"):
            reader.read("net", 2)
        assert reader.mark("net", 2) == before  # not tried again until something is uploaded
    monkeypatch.setattr(bucket, "_ABANDONED", timedelta(seconds=-1))
    assert made.save(module(3), ABOUT) == 2 + left  # whoever uploads 2 may go on
    assert made.find() == {"net": [1, 2 + left]}  # the half of it is removed
    assert weights(made.read("net", 2 + left)) == expected(3)


@pytest.mark.parametrize("file", ["model.json", "manifest.json"])
def test_a_write_whose_answer_is_lost_and_that_is_sent_again_is_one_version(
    open_bucket, storage, file
):
    lost = []

    def lose_the_first_answer(method, path):
        if method == "PUT" and file in path and not lost:
            lost.append(path)
            return "cut"
        return None

    storage.fault = lose_the_first_answer
    made = open_bucket()
    version = made.save(module(1), ABOUT)
    assert lost
    assert made.versions("net") == [version]
    assert version == 1 + (file == "model.json")  # whose number it was, it cannot know
    assert weights(made.read("net", version)) == expected(1)


FAULTS = {
    "down": ("down", StorageUnavailable, "the connection broke"),
    "cut": ("cut", StorageUnavailable, "cannot be read"),
    "slow": (1.5, StorageUnavailable, "no answer in time"),
    "corrupt": ("corrupt", CheckpointRefused, "damaged or replaced"),
    "refused": ("AccessDenied", StorageUnavailable, "AccessDenied: check what the credentials"),
    "clock": ("RequestTimeTooSkewed", StorageUnavailable, "set this machine's clock"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_broken_read_is_an_error_and_is_tried_again(
    open_bucket, storage, name, file, monkeypatch
):
    monkeypatch.setattr(object_storage, "_RETRIES", 0)
    fault, error, text = FAULTS[name]
    if (name, file) == ("corrupt", "manifest.json"):
        error, text = (CheckpointRefused, "manifest.json|damaged")
    made = open_bucket("a")
    made.save(module(1), ABOUT)
    reader = open_bucket("b")
    reader.find()
    storage.fault = on("GET", file, fault)
    before = reader.mark("net", 1)
    with pytest.raises(error, match=text):
        reader.read("net", 1)
    storage.fault = lambda *_: None
    assert reader.mark("net", 1) != before  # a reader that compares marks reads it again
    assert weights(reader.read("net", 1)) == expected(1)


def test_retries_wait_longer_each_time(open_bucket, storage, monkeypatch):
    monkeypatch.setattr(bucket, "_RETRY_SECONDS", (100.0, 250.0))
    made = open_bucket()
    made.save(module(1), ABOUT)
    storage.fault = on("GET", "model.safetensors", "down")
    clock = [1000.0]
    monkeypatch.setattr(bucket.time, "monotonic", lambda: clock[0])
    for wait in (100, 200, 250, 250):
        before = made.mark("net", 1)
        with pytest.raises(StorageUnavailable):
            made.read("net", 1)
        clock[0] += wait - 1
        assert made.mark("net", 1) == before
        clock[0] += 2
        assert made.mark("net", 1) != before


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(
    open_bucket, storage, monkeypatch
):
    monkeypatch.setattr(bucket, "_PART", 100)
    made, other = open_bucket("a"), open_bucket("c")
    made.save(module(1), ABOUT)
    files = checkpoint.dump(module(2), ABOUT)
    seen = []

    def replace(method, path):
        if method == "GET" and "model.safetensors" in path:
            seen.append(path)
            if len(seen) == 2:
                other._store.put("net/1/model.safetensors", files["model.safetensors"])
        return

    storage.fault = replace
    reader = open_bucket("b")
    reader.find()
    with pytest.raises(CheckpointRefused, match=r"net/1/model.safetensors: damaged or replaced"):
        reader.read("net", 1)
    assert len(seen) > 2
    for name in ("model.json", "manifest.json"):
        other._store.put(f"net/1/{name}", files[name])
    reader.find()
    assert weights(reader.read("net", 1)) == expected(2)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("InvalidAccessKeyId", "cannot be listed: InvalidAccessKeyId: check the credentials"),
        ("NoSuchBucket", "check the bucket's name"),
        ("down", "cannot be listed"),
    ],
)
def test_a_listing_that_fails_says_what_to_check(open_bucket, storage, fault, text):
    storage.fault = on("GET", "list-type", fault)
    with pytest.raises(StorageUnavailable, match=text) as caught:
        open_bucket().find()
    assert len(str(caught.value)) < 400
    assert "secret" not in str(caught.value)


def test_nothing_listens(open_bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match="no connection: check the network"):
        open_bucket().find()


def three_of_which_two_are_read(bucket, pin):
    for seed in (1, 2, 3):
        bucket.save(module(seed), ABOUT)
    bucket.pin("net", pin)
    for version in (1, 2):
        bucket.read("net", version)
    assert bucket.pinned("net") == pin


def test_a_start_without_storage_takes_the_cache_if_it_may(open_bucket, storage):
    three_of_which_two_are_read(open_bucket(), pin=2)
    storage.fault = lambda *_: "down"
    with pytest.raises(StorageUnavailable):
        open_bucket().find()
    with pytest.raises(StorageUnavailable):
        open_bucket("empty", start_from_cache=True).find()
    again = open_bucket(start_from_cache=True)
    assert again.find() == {"net": [1, 2]}  # 3 was never read
    assert "started from the cache, as of 20" in again.problem
    assert again.pinned("net") == 2
    assert weights(again.read("net", 2)) == expected(2)
    assert again.find() == {"net": [1, 2]}
    storage.fault = lambda *_: None
    assert (again.find(), again.problem) == ({"net": [1, 2, 3]}, None)
    storage.fault = lambda *_: "down"
    with pytest.raises(StorageUnavailable):
        again.find()


def test_such_a_start_knows_what_every_process_has_read_and_what_was_removed(open_bucket, storage):
    three_of_which_two_are_read(made := open_bucket(), pin=1)
    other = open_bucket()  # another process, with the same cache
    other.read("net", 3)

    def offline():
        storage.fault = lambda *_: "down"
        found = open_bucket(start_from_cache=True)
        versions = found.find()
        first = found.problem
        with found.local("net", versions["net"][0]):
            found.find()
        assert found.problem == first  # is not logged again
        pinned = found.pinned("net")
        storage.fault = lambda *_: None
        return versions, pinned

    assert offline() == ({"net": [1, 2, 3]}, 1)
    made.pin("net", None)
    made.remove("net", 3)
    assert offline() == ({"net": [1, 2]}, None)


def test_what_is_cached_does_not_wait_for_a_download(open_bucket, storage, tmp_path):
    made = open_bucket("a")
    for seed in (1, 2):
        made.save(module(seed), ABOUT)
    shared = open_bucket("shared")
    shared.read("net", 2)
    reached, done = threading.Event(), threading.Event()

    def stall(method, path):
        if method == "GET" and "1/model.safetensors" in path:
            reached.set()
            done.wait(20)
        return

    storage.fault = stall
    reader = reading(tmp_path / "shared")
    assert reached.wait(60)
    assert weights(shared.read("net", 2)) == expected(2)
    done.set()
    assert reader.communicate(timeout=60)[0]


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_cache_is_read_again(open_bucket, damage):
    made = open_bucket()
    made.save(module(1), ABOUT)
    with made.local("net", 1) as path:
        assert (path.name, path.parent.name) == ("1", "net")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10]) if damage == "cut" else file.unlink()
    with pytest.raises(CheckpointRefused):
        made.read("net", 1)
    assert weights(made.read("net", 1)) == expected(1)


def test_a_version_that_is_bad_itself_is_not_downloaded_again(open_bucket, storage):
    made = open_bucket()
    files = checkpoint.dump(module(1), ABOUT)
    about = json.loads(files["model.json"])
    files["model.json"] = json.dumps({**about, "classes": ["a"]}).encode()
    listed = {
        name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for name, raw in files.items()
        if name != "manifest.json"
    }
    files["manifest.json"] = json.dumps({"files": listed}).encode()
    for name, raw in files.items():
        made._store.put(f"net/1/{name}", raw)
    for _ in range(2):
        before = made.mark("net", 1)
        with pytest.raises(CheckpointRefused, match="one class name a logit") as caught:
            made.read("net", 1)
        assert made.mark("net", 1) == before
    assert made.relative(str(caught.value)).startswith("net/1/model.json")
    assert sum("model.json" in path for path in storage.asked("GET")) == 1


def test_the_cache_keeps_what_was_used_last_and_what_is_being_read(open_bucket, tmp_path):
    made = open_bucket()
    for seed in range(4):
        made.save(module(seed), ABOUT)
    with made.local("net", 1) as first:
        size = sum(file.stat().st_size for file in first.iterdir())
    small = open_bucket("small", limit=int(2.5 * size))

    def cached():
        return sorted(int(f.name) for f in (tmp_path / "small" / "versions").glob("*/net/*"))

    for version in (1, 2, 1, 3):
        small.read("net", version)
        time.sleep(0.02)  # the clock of files is coarse
    assert cached() == [1, 3]
    with small.local("net", 1) as held:
        for version in (2, 3, 4):
            small.read("net", version)
            assert held.is_dir()
    assert cached() == [1, 4]


def reading(cache):
    """Start a process that reads the version into a cache."""
    code = (
        "import sys; from pathlib import Path; from dropserve.models.bucket import Bucket\n"
        f"with Bucket({URL!r}, Path(sys.argv[1]), {LIMIT}).local('net', 1) as path:\n"
        "    print(len((path / 'model.safetensors').read_bytes()))"
    )
    command = [sys.executable, "-c", code, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_share_one_download(open_bucket, storage, tmp_path):
    open_bucket("a").save(module(1), ABOUT)
    storage.requests.clear()
    storage.fault = on("GET", "model.safetensors", 0.3)
    readers = [reading(tmp_path / "shared") for _ in range(2)]
    sizes = {reader.communicate(timeout=60)[0] for reader in readers}
    assert sizes == {f"{len(checkpoint.dump(module(1), ABOUT)['model.safetensors'])}\n"}
    assert sum("model.safetensors" in path for path in storage.asked("GET")) == 1


def test_a_killed_download_leaves_nothing_that_is_read(open_bucket, storage, tmp_path):
    open_bucket("a").save(module(1), ABOUT)
    reached = threading.Event()

    def stall(method, path):
        if method == "GET" and "model.safetensors" in path:
            reached.set()
            return 0.5
        return None

    storage.fault = stall
    reader = reading(tmp_path / "shared")
    assert reached.wait(60)
    reader.kill()
    reader.communicate()
    storage.fault = lambda *_: None
    made = open_bucket("shared")
    assert weights(made.read("net", 1)) == expected(1)
    assert not [*(tmp_path / "shared").glob(".new-*")]


def test_other_objects_are_no_versions(open_bucket):
    made = open_bucket()
    for key in ("net/1/notes.txt", "net/0/model.json", "net/x/manifest.json", "readme", ".a/1/x"):
        made._store.put(key, b"x")
    assert made.find() == {}


def test_a_cache_that_cannot_be_written_is_an_error(open_bucket, tmp_path):
    open_bucket("a").save(module(1), ABOUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointNotWritten, match="cannot keep downloaded versions"):
        open_bucket("file").read("net", 1)


def test_an_object_of_an_odd_name_keeps_no_other_model_from_being_read(
    open_bucket, storage, caplog
):
    made = open_bucket()
    made.save(module(1), ABOUT)
    odd = f"{storage.environment['AWS_ENDPOINT_URL']}/models/prod/odd//x"
    assert httpx.put(odd, content=b"x").status_code == 200
    for _ in range(2):
        assert made.find() == {"net": [1]}
    told = [r.message for r in caplog.records if r.name == "dropserve.models.bucket"]
    assert [text[:38] for text in told] == ["s3://models/prod/odd: cannot be listed"]
    assert made.save(module(2), ABOUT) == 2


def test_a_manifest_with_other_sizes_costs_no_cached_version(open_bucket):
    made = open_bucket(limit=LIMIT)
    made.save(module(1), ABOUT)
    with made.local("net", 1) as kept:
        pass
    files = checkpoint.dump(module(2), ABOUT)
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["model.safetensors"]["bytes"] = 8 * 2**30
    for name, raw in (files | {"manifest.json": json.dumps(manifest).encode()}).items():
        made._store.put(f"other/1/{name}", raw)
    made.find()
    with pytest.raises(CheckpointRefused, match=r"other/1/model.safetensors: damaged or replaced"):
        made.read("other", 1)
    assert kept.is_dir()


@pytest.mark.parametrize("known", ["", "[]", '{"pins": {"net": 1}, "manifests": {}}'])
def test_a_listing_of_another_release_in_the_cache_is_written_anew(open_bucket, tmp_path, known):
    made = open_bucket()
    made.save(module(1), ABOUT)
    made.find()
    (file,) = (tmp_path / "cache").glob("listing-*.json")
    file.write_text(known.replace("{", '{"where": "s3://models/prod", "versions": {}, ', 1))
    again = open_bucket()
    assert again.find() == {"net": [1]}
    assert json.loads(file.read_text())["versions"]["net"].keys() == {"1"}

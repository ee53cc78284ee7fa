"""Bulk scoring that is killed ten times: complete, without repeats, and equal to an unbroken run.

Minutes, with Ray and an S3 server on loopback: `make test-scale SCALE_TEST=score`; SCALE=0.2 kills
twice.
"""

import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from dropserve.models.object_storage import open_store
from tests.helpers import encode, noise
from tests.reliability.figures import SCALE

pytestmark = pytest.mark.timeout(600)
KILLS = max(2, round(10 * SCALE))
COMMAND = [sys.executable, "-c", "from dropserve.service.cli.main import app; app()", "score"]
FILES, GROUPS, ROWS = 3, 40, 834
"""Of Parquet: files, groups of rows in each, and rows in each of these: 100,000 in all."""
IMAGES = 100_000
BAD = {"cut.png": b"\x89PNG\r\n\x1a\n cut", "empty.jpg": b"", "text.webp": b"hello"}


@pytest.fixture(scope="module")
def s3(running_storage):
    """A bucket, and what points obstore to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (running_storage.environment | {"AWS_TIMEOUT": "30s"}).items():
            patch.setenv(name, value)
        yield "s3://models"


@pytest.fixture(scope="module")
def environment(checkpoints):
    return os.environ | {"OMP_NUM_THREADS": "1", "DROPSERVE_CHECKPOINTS": str(checkpoints)}


def pngs(count, seed):
    return [encode(pixels) for pixels in noise(count, 8, 8, seed=seed)]


def upload(url):
    """Store Parquet with odd rows, images beside it, and objects that are no images."""
    store = open_store(url)
    for number in range(FILES):
        rows = GROUPS * ROWS
        images = pngs(rows, number)
        images[5], images[ROWS + 1] = b"no image", None
        names = [f"{number}/{i:05}" for i in range(rows)]
        names[7] = None
        file = io.BytesIO()
        table = pa.table({"path": names, "image": pa.array(images, pa.binary()), "other": names})
        parquet.write_table(table, file, row_group_size=ROWS)
        store.put(f"tables/{number}.parquet", file.getvalue())
    for i, png in enumerate(pngs(40, 99)):
        store.put(f"images/{i} ä.PNG", png)
    for name, content in BAD.items():
        store.put(f"images/{name}", content)
    store.put("notes.txt", b"no image")


def parts(url):
    """What a run has written: by name, the digest of its bytes and when."""
    found = [about for page in open_store(url).list() for about in page]
    return {o["path"]: (o["e_tag"], o["last_modified"]) for o in found if "part" in o["path"]}


def rows(url):
    store = open_store(url)
    tables = [
        parquet.read_table(io.BytesIO(bytes(store.get(n).bytes()))) for n in sorted(parts(url))
    ]
    return pa.concat_tables(tables).to_pylist()


def finish(arguments, environment):
    command = [*COMMAND, *arguments]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def kill(arguments, environment, reached):
    """Kill a run with SIGKILL at a random moment after `reached` says so; False: it has ended."""
    with subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=subprocess.DEVNULL
    ) as run:
        while not reached():
            if run.poll() is not None:
                assert run.returncode == 0
                return False
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.2))
        processes = scoring(run.pid)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert psutil.wait_procs(processes, timeout=60)[1] == []  # none outlives its driver
    return run.returncode == -signal.SIGKILL


def scoring(driver):
    """Processes that score images: of Ray's, the actors."""
    found = psutil.Process(driver).children(recursive=True)
    return [p for p in found if not p.name().startswith("ray::") or "Map" in p.name()]


def test_ray_finishes_what_killed_drivers_began(s3, environment, checkpoints, tmp_path):
    upload(f"{s3}/in")
    models = open_store(f"{s3}/models")
    for path in checkpoints.rglob("*.*"):
        models.put(str(path.relative_to(checkpoints)), path.read_bytes())
    own = {"DROPSERVE_CHECKPOINTS": f"{s3}/models", "DROPSERVE_CACHE": str(tmp_path / "cache")}
    environment = environment | own
    ray = [f"{s3}/in", "--engine", "ray", "--actors", "2", "--model", "digits-mlp"]
    total = FILES * GROUPS * ROWS + 40 + len(BAD)
    said = finish([*ray, "--out", f"{s3}/whole"], environment)
    assert f"{total:,} images by digits-mlp version 2, {3 * FILES // 3 * 2 + 3} of them" in said
    whole, out = parts(f"{s3}/whole"), f"{s3}/killed"
    kills, kept = 0, {}
    for _ in range(KILLS):
        wanted = len(kept) + random.randint(0, 4)
        kills += kill([*ray, "--out", out], environment, lambda n=wanted: len(parts(out)) >= n)
        found = parts(out)
        assert kept.items() <= found.items()  # nothing was scored again
        kept = found
    assert kills == KILLS
    assert 0 < len(kept) < len(whole)
    finish([*ray, "--out", out], environment)
    found = parts(out)
    assert kept.items() <= found.items()
    assert {n: tag for n, (tag, _) in found.items()} == {n: tag for n, (tag, _) in whole.items()}
    table = rows(out)
    paths = [row["path"] for row in table]
    assert len(paths) == len(set(paths)) == total
    images = {row["path"]: row for row in table}
    assert f"{s3}/in/tables/0.parquet#0.7" in images  # a row without an id
    bad = {path for path, row in images.items() if row["error"]}
    assert bad == {f"{n}/{i:05}" for n in range(FILES) for i in (5, ROWS + 1)} | {
        f"{s3}/in/images/{name}" for name in BAD
    }
    orphaned = "part-000000-01234567.parquet"  # as an actor of a run that was begun anew may
    open_store(out).put(orphaned, b"of another run")
    finish([*ray, "--out", out], environment)
    assert parts(out) == found
    command = [*COMMAND, *ray, "--out", out, "--seed", "4"]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (other.returncode, "had seed 0, not 4" in other.stderr) == (2, True)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_local_engine_finishes_what_was_killed(environment, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, png in enumerate(pngs(IMAGES, 7)):
        (folder / f"{i:05}.png").write_bytes(png)
    for name, content in BAD.items():
        (folder / name).write_bytes(content)
    local = [str(folder), "--engine", "local", "--model", "digits-mlp"]
    finish([*local, "--out", str(tmp_path / "whole.csv")], environment)
    out, part = tmp_path / "killed.csv", tmp_path / "killed.csv.part"

    def lines():
        return part.read_bytes().count(b"\n") if part.exists() else 0

    kept = 0
    for _ in range(KILLS):
        wanted = kept + random.randint(1, 1500)
        assert kill([*local, "--out", str(out)], environment, lambda n=wanted: lines() >= n)
        kept = lines()
    assert 0 < kept < IMAGES
    finish([*local, "--out", str(out)], environment)
    whole, found = read(tmp_path / "whole.csv"), read(out)
    assert len(found) == IMAGES + len(BAD)
    for row, other in zip(found, whole, strict=True):
        figures = [column for column in row if "." in (row[column] or "") and column != "path"]
        for column in figures:
            if column != "error":
                assert float(row.pop(column)) == pytest.approx(float(other.pop(column)), abs=1e-5)
        assert row == other


def test_ray_scores_a_folder_as_the_local_engine_does(environment, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, png in enumerate(pngs(300, 8)):
        (folder / f"{i:03}.png").write_bytes(png)
    Image.fromarray(noise(40, 60, 3)).save(folder / "colour.jpg")
    odd = os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    Path(odd).write_bytes(pngs(1, 1)[0])
    environment = environment | {"DROPSERVE_MAX_BODY_BYTES": "2000000"}
    with (folder / "large.png").open("wb") as file:
        file.truncate(2_000_001)
    model = ["--model", "digits-mlp", "--mode", "predict"]
    finish(
        [str(folder), "--out", str(tmp_path / "a.parquet"), "--engine", "local", *model],
        environment,
    )
    finish([str(folder), "--out", str(tmp_path / "b"), "--engine", "ray", *model], environment)
    a = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    b = sorted(parquet.read_table(tmp_path / "b").to_pylist(), key=lambda row: row["path"])
    assert len(b) == 303
    (large,) = [row for row in b if row["error"]]
    assert "larger than 2,000,000 bytes" in large["error"]
    for row, other in zip(a, b, strict=True):
        if row == large:
            continue
        np.testing.assert_allclose(row.pop("probability"), other.pop("probability"), atol=1e-5)
        assert row == other

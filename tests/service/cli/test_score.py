"""`dropserve score` over a real server: a row a image, each once, whatever happens."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from dropserve.service import errors
from dropserve.service.cli import ask, score, score_ray, scores
from dropserve.service.client import AsyncDropserveClient, DropserveClient

COLUMNS = [
    "path", "label", "index", "probability", "predictive_entropy", "expected_entropy",
    "mutual_information", "variation_ratio", "model", "version", "error",
]  # fmt: skip
BAD = {
    "cut.png": (b"\x89PNG\r\n\x1a\n cut", "cannot be decoded"),
    "empty.jpg": (b"", "an empty file"),
    "sub/text.webp": (b"hello", "no PNG, JPEG or WebP"),
}


@pytest.fixture
def folder(tmp_path):
    """Twenty images, three that are none, and a file that nobody would take for one."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(20):
        pixels = random.integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / ("sub" if i % 2 else "") / f"{i:02}.PNG")
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def scored(run, server, folder, tmp_path):
    def scored(*options, out="scores.csv"):
        arguments = ["score", folder, "--out", tmp_path / out, "--url", server.url, *options]
        return run(*arguments), tmp_path / out

    return scored


@pytest.fixture
def local(run, checkpoints, folder, tmp_path):
    def local(*options, out="local.csv"):
        arguments = ["score", folder, "--out", tmp_path / out, "--engine", "local"]
        own = ["--checkpoints", checkpoints, "--model", "digits-mlp", "--processes", 1]
        return run(*arguments, *own, *options), tmp_path / out

    return local


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_has_a_row_as_uncertainty_answers_it(scored, server, folder):
    result, out = scored("--samples", 50, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: 23 images by digits-mlp version 2, 3 of them with an error\n"
    rows = read(out)
    assert list(rows[0]) == COLUMNS
    assert [row["path"] for row in rows] == sorted(str(p) for p in score.images(folder))
    with DropserveClient(server.url) as client:
        said = client.uncertainty(Path(rows[0]["path"]), samples=50, seed=3).predictions[0]
    assert rows[0]["label"] == said.label
    assert int(rows[0]["index"]) == said.index
    assert float(rows[0]["probability"]) == pytest.approx(said.mean[said.index], abs=1e-5)
    for column in COLUMNS[4:8]:
        assert float(rows[0][column]) == pytest.approx(getattr(said, column), abs=1e-4)
    assert (rows[0]["model"], rows[0]["version"], rows[0]["error"]) == ("digits-mlp", "2", "")


def test_a_bad_image_is_a_row_that_says_what_is_wrong_with_it(scored, folder):
    rows = {row["path"]: row for row in read(scored()[1])}
    for name, (_, message) in BAD.items():
        row = rows.pop(str(folder / name))
        assert message in row["error"]
        assert not any(row[column] for column in COLUMNS[1:-1])
    assert not any(row["error"] for row in rows.values())


@pytest.mark.parametrize("sort", ["mutual-information", "predictive-entropy"])
def test_the_most_uncertain_come_first_and_errors_last(scored, sort):
    rows = read(scored("--sort", sort)[1])
    values = [float(row[sort.replace("-", "_")]) for row in rows[:20]]
    assert values == sorted(values, reverse=True)
    assert all(row["error"] for row in rows[20:])


def test_parquet_holds_the_same_with_types(scored):
    rows = read(scored()[1])
    result, out = scored(out="scores.parquet")
    assert result.exit_code == 0, result.output
    table = parquet.read_table(out)
    kinds = [str(field.type) for field in table.schema]
    assert kinds == ["string", "string", "int64", *["double"] * 5, "string", "int64", "string"]
    for typed, text in zip(table.to_pylist(), rows, strict=True):
        assert typed["path"] == text["path"]
        assert (typed["label"] or "") == text["label"]
        if not text["error"]:
            figure = float(text["mutual_information"])
            assert typed["mutual_information"] == pytest.approx(figure, abs=1e-4)


def test_parquet_without_pyarrow_says_what_to_install(scored, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result, out = scored(out="scores.parquet")
    assert result.exit_code == 2
    assert "dropserve[parquet]" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGINT, 130, "interrupted: the same command continues from here\n"),
    ],
)
def test_an_interrupted_run_goes_on_and_no_row_is_lost_or_repeated(
    program, scored, server, folder, tmp_path, how, code, said
):
    image = (folder / "00.PNG").read_bytes()
    for i in range(400):
        (folder / f"more-{i:03}.png").write_bytes(image)
    out, part = tmp_path / "scores.csv", tmp_path / "scores.csv.part"
    options = ["--batch", "2", "--in-flight", "2"]
    command = [*program, "score", folder, "--out", out, "--url", server.url, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        while not part.exists() or part.read_bytes().count(b"\n") < 30:
            assert run.poll() is None
            time.sleep(0.005)
        run.send_signal(how)
        assert run.communicate(timeout=30)[1] == said
    assert run.returncode == code
    assert not out.exists()
    before = [json.loads(line)[0] for line in part.read_bytes().splitlines()[1:-1]]
    assert 20 < len(before) < 420
    with part.open("ab") as file:
        file.write(b'["cut off')  # as a crash may leave it
    assert scored("--batch", 2)[0].exit_code == 0
    paths = [row["path"] for row in read(out)]
    assert paths == sorted(str(path) for path in score.images(folder))
    assert not part.exists()


def begun(out, folder, version, sha256, samples, rows):
    run = {"folder": str(folder), "model": "digits-mlp", "version": version, "sha256": sha256}
    lines = [run | {"samples": samples, "seed": 0}, *rows]
    out.with_name(out.name + ".part").write_text("".join(json.dumps(x) + "\n" for x in lines))


ROW = ["00.PNG", "9", 9, 0.9, 0.3, 0.2, 0.1, 0.0, "digits-mlp", 1, None]


def test_a_run_goes_on_with_the_version_that_it_began_with(scored, server, folder, tmp_path):
    known, unread, gone = (str(folder / name) for name in ("00.PNG", "02.PNG", "gone.png"))
    failed = [unread, *[None] * 9, "Too many open files"]
    with DropserveClient(server.url) as client:
        sha256 = client.model("digits-mlp", 1).sha256
    rows = [[known, *ROW[1:]], failed, [gone, *ROW[1:]]]
    begun(tmp_path / "scores.csv", folder, 1, sha256, 100, rows)
    result, out = scored()
    assert result.exit_code == 0, result.output
    rows = {row["path"]: row for row in read(out)}
    assert {row["version"] for row in rows.values() if not row["error"]} == {"1"}
    assert list(rows) == sorted(map(str, score.images(folder)))  # without the one that is gone
    assert rows[known]["label"] == "9"  # it was not asked about again
    assert (rows[unread]["error"], rows[unread]["version"]) == ("", "1")


def test_a_run_does_not_go_on_with_other_weights(scored, folder, tmp_path):
    begun(tmp_path / "scores.csv", folder, 2, "a" * 64, 100, [ROW])
    result, out = scored()
    assert result.exit_code == 2
    assert f"had sha256 {'a' * 64}, not " in result.stderr
    assert not out.exists()


def test_another_run_is_refused_by_what_differs_unless_begun_anew(scored, folder, tmp_path):
    begun(tmp_path / "scores.csv", folder, 2, "a" * 64, 50, [ROW])
    result, out = scored("--seed", 4)
    assert result.exit_code == 2
    assert "had samples 50, not 100; seed 0, not 4: " in result.stderr
    assert "--restart" in result.stderr
    assert not out.exists()
    assert scored("--seed", 4, "--restart")[0].exit_code == 0
    assert len(read(out)) == 23


def test_a_file_that_is_there_is_kept_unless_begun_anew(scored):
    _, out = scored()
    out.write_text("mine")
    result, _ = scored()
    assert (result.exit_code, out.read_text()) == (2, "mine")
    assert "--restart" in result.stderr
    assert scored("--restart")[0].exit_code == 0
    assert len(read(out)) == 23


@pytest.mark.parametrize("content", ["no JSON\n", '{"folder": 1}\n', "[1]\n", "{}\n[1, 2]\n"])
def test_a_progress_file_of_something_else_is_refused(scored, tmp_path, content):
    (tmp_path / "scores.csv.part").write_text(content)
    result, _ = scored()
    assert result.exit_code == 2
    assert "no scores in it" in result.stderr


def test_two_runs_do_not_write_the_same_file(scored, tmp_path):
    with (tmp_path / "scores.csv.part").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result, _ = scored()
    assert result.exit_code == 2
    assert "another run is writing it" in result.stderr


@pytest.mark.parametrize("options", [["--samples", 5000], ["--seed", -1]])
def test_what_is_not_the_images_fault_ends_the_run(scored, tmp_path, options):
    result, _ = scored(*options)
    assert result.exit_code == 2
    assert options[0].removeprefix("--") in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]


def test_a_folder_without_images_is_a_line(run, tmp_path):
    (tmp_path / "folder").mkdir()
    for folder, message in (("folder", "no .png"), ("none", "No such file")):
        command = ["score", str(tmp_path / folder), "--out", str(tmp_path / "a.csv")]
        result = run(*command)
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_name_that_is_no_text_is_written_as_text(scored, folder):
    odd = os.fsdecode(os.fsencode(folder) + b"/\xff,\n\"'.png")
    Path(odd).write_bytes((folder / "00.PNG").read_bytes())
    result, out = scored()
    assert result.exit_code == 0, result.output
    (row,) = [row for row in read(out) if "udcff" in row["path"]]
    assert row["label"]
    assert row["path"].endswith("\\udcff,\n\"'.png")


def test_batches_end_at_so_many_images_or_bytes(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, size in zip(paths, [1, 1, 1, 12 * 2**20, 4 * 2**20 + 1, 20 * 2**20], strict=True):
        with path.open("wb") as file:
            file.truncate(size)
    sizes = [len(batch) for batch in ask.batches([*paths, tmp_path / "none.png"], 3)]
    assert sizes == [3, 1, 1, 1, 1]


def test_a_service_that_goes_away_is_the_error_itself(folder):
    def answer(request):
        if request.headers["content-type"] == "image/png":  # the image that is asked about first
            predictions = [{
                "label": "a", "index": 0, "mean": [1.0], "variance": None, "standard_error": None,
                "predictive_entropy": 0, "expected_entropy": 0, "mutual_information": 0,
                "variation_ratio": 0, "interval": {"level": 0.9, "lower": [0], "upper": [1]},
            }]  # fmt: skip
            about = {"model": "m", "version": 1, "method": "dropout", "samples": 1, "seed": 0}
            about |= {"masks": "stratified", "log_base": "e", "predictions": predictions}
            return httpx.Response(200, json=about)
        raise httpx.ConnectError("gone")

    client = AsyncDropserveClient(transport=httpx.MockTransport(answer))
    with pytest.raises(errors.Unreachable, match="gone"):
        ask.send_all(client, "uncertainty", score.images(folder), pytest.fail, batch=8, in_flight=3)


ODD = {
    "grey-alpha.png": lambda: Image.new("LA", (31, 17), (200, 90)),
    "palette.png": lambda: Image.new("P", (3, 300), 7),
    "large.jpg": lambda: Image.radial_gradient("L").resize((900, 400)),
    "colour.webp": lambda: Image.new("RGB", (20, 9), (250, 130, 3)),
}


def assert_same_scores(rows, others):
    """All values but figures are equal; errors are both there."""
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert [row[c] for c in (*COLUMNS[:3], "model", "version")] == [
            other[c] for c in (*COLUMNS[:3], "model", "version")
        ]
        assert bool(row["error"]) == bool(other["error"])
        for column in COLUMNS[3:8]:
            if row[column] or other[column]:
                assert float(row[column]) == pytest.approx(float(other[column]), abs=1e-5)


def test_the_local_engine_scores_as_the_service_does(scored, local, folder):
    for name, make in ODD.items():
        make().save(folder / name)
    rows = read(scored("--seed", 3, "--sort", "path")[1])
    result, out = local("--seed", 3)
    assert result.exit_code == 0, result.output
    said = f"{out}: 27 images by digits-mlp version 2, 3 of them with an error; decoding "
    assert result.stdout.startswith(said)
    assert_same_scores(rows, read(out))
    assert sum(bool(row["mutual_information"]) for row in read(out)) == 24


def test_a_file_that_is_too_large_is_a_row_and_a_run_keeps_its_precision(
    local, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("DROPSERVE_MAX_BODY_BYTES", "2000000")
    with (folder / "large.png").open("wb") as file:
        file.truncate(2_000_001)

    def interrupted(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(scores, "write_table", interrupted)
        assert local()[0].exit_code == 1
    part = tmp_path / "local.csv.part"
    said = [json.loads(line) for line in part.read_text().splitlines()]
    assert (said[0]["device"], said[0]["precision"]) == ("auto", "float32")
    monkeypatch.setenv("DROPSERVE_PRECISION", "bfloat16")
    assert "had precision float32, not bfloat16" in local()[0].stderr
    (row,) = [row for row in said[1:] if row[0].endswith("large.png")]
    assert row[-1] == "larger than 2,000,000 bytes, DROPSERVE_MAX_BODY_BYTES"
    monkeypatch.delenv("DROPSERVE_PRECISION")
    result, out = local()
    assert result.exit_code == 0
    (row,) = [row for row in read(out) if row["path"].endswith("large.png")]
    assert row["error"] == "larger than 2,000,000 bytes, DROPSERVE_MAX_BODY_BYTES"


def test_a_run_begun_over_http_is_finished_by_the_local_engine(scored, local, server, tmp_path):
    rows = read(scored("--mode", "predict")[1])
    assert {row["mutual_information"] for row in rows} == {""}
    with DropserveClient(server.url) as client:
        sha256 = client.model("digits-mlp", 2).sha256
    run = {"folder": str(tmp_path / "images"), "model": "digits-mlp", "version": 2}
    run |= {"sha256": sha256, "mode": "predict", "samples": None, "seed": None}
    kept = [row for row in rows if not row["error"]][:7]
    kept[0] |= {"probability": "0.125"}  # it is not scored again
    typed = {"index": int, "version": int, "probability": float}
    lines = [run, *([typed.get(c, str)(r[c]) if r[c] else None for c in COLUMNS] for r in kept)]
    part = tmp_path / "local.csv.part"
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result, out = local("--mode", "predict")
    assert result.exit_code == 0, result.output
    assert_same_scores(rows, read(out))
    assert not part.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "local", "--url", "http://x"], "--url is of --engine http, not of local"),
        (["--engine", "local", "--actors", "2"], "--actors is of --engine ray, not of local"),
        (["--checkpoints", "c"], "--checkpoints is of --engine local and ray, not of http"),
        (["--engine", "ray", "--sort", "path"], "--sort is of --engine http and local"),
        (["--mode", "predict", "--samples", "9"], "--samples is of --mode uncertainty"),
        (["--engine", "local"], "give --model: there are colour-cnn, digits-mlp in"),
        (["--engine", "local", "--model", "digits"], "did you mean digits-mlp?"),
        (["--engine", "local", "--model", "digits-mlp", "--version", "9"], "no version 9"),
        (["--engine", "local", "--version", "1"], "give --model as well"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    run, checkpoints, folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.setenv("DROPSERVE_CHECKPOINTS", str(checkpoints))
    result = run("score", folder, "--out", tmp_path / "a.csv", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "a.csv.part").exists()


def test_the_ray_engine_says_what_to_install(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_BACKEND_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # it sets them
    result = run("score", folder, "--out", tmp_path / "scores", "--engine", "ray")
    assert result.exit_code == 2
    assert "dropserve[ray]" in result.stderr


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sizes=st.lists(st.integers(0, 12), max_size=12), groups=st.lists(st.integers(1, 99)))
def test_parts_have_everything_once_and_are_no_larger_than_they_may(
    sizes, groups, tmp_path_factory, monkeypatch
):
    monkeypatch.setattr(score_ray, "IMAGES", 3)
    monkeypatch.setattr(score_ray, "BYTES", 10)
    folder = tmp_path_factory.mktemp("parts")
    (folder / "99.png").write_bytes(bytes(11))
    sizes = dict(enumerate(sizes)) | {99: 11}
    for number, size in sizes.items():
        (folder / f"{number:02}.png").write_bytes(bytes(size))
    schema = pa.schema({"image": pa.binary()})
    with parquet.ParquetWriter(folder / "table.parquet", schema) as file:
        for rows in groups:
            file.write_table(pa.table({"image": [b"image"] * rows}, schema))
    parts, _ = score_ray.Source(str(folder), score_ray.Columns("image", "path")).parts()
    images = [[int(name[:2]) for name in part.files] for part in parts if part.group is None]
    assert [number for numbers in images for number in numbers] == [*sizes]
    bytes_ = [[sizes[k] for k in numbers] for numbers in images]
    for part in bytes_:
        assert len(part) <= 3
        assert len(part) == 1 or sum(part) <= 10
    for part, (first, *_) in pairwise(bytes_):
        assert len(part) == 3 or sum(part) + first > 10
    for group, rows in enumerate(groups):
        slices = [(p.start, p.stop) for p in parts if p.group == group]
        assert [k for start, stop in slices for k in range(start, stop)] == [*range(rows)]
        assert max(stop - start for start, stop in slices) == min(rows, max(3, -(-rows // 16)))
    assert sum(part.images for part in parts) == len(sizes) + sum(groups)
    assert len({part.name for part in parts}) == len(parts)

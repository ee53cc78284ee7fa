"""Storage: invalid files are refused with its reason, whatever the bytes."""

import json
import os
import re
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.models.errors import CheckpointRefused
from dropserve.models.storage import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    parse_json,
    parse_tensors,
    read_once,
    replace_durably,
    write_durably,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([7, -8])}
VALID = safetensors.torch.save(TENSORS)


def pack(header, data=b""):
    """Lay out a safetensors file: the header's length, the header, the tensors' bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start, stop, shape=None, dtype="F32"):
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def empty_tensors(count):
    return {f"t{i}": entry(0, 0) for i in range(count)}


DUPLICATE = pack(
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    bytes(8),
)
INVALID = {
    "nothing": (b"", "not safetensors"),
    "seven bytes": (VALID[:7], "not safetensors"),
    "cut in the header": (VALID[:-41], "truncated in its header"),  # of its data and a byte
    "cut in the data": (VALID[:-1], "invalid safetensors"),
    "a trailing byte": (VALID + b"\0", "invalid safetensors"),
    "a header of 2^63 bytes": ((2**63).to_bytes(8, "little") + VALID[8:], "a header of 92233720"),
    "a header over the limit": (pack(b" " * (MAX_HEADER_BYTES + 1)), "a header of 1000001 bytes"),
    "200,000 empty tensors": (pack(empty_tensors(200_000)), "not safetensors: a header of"),
    "too many tensors": (pack(empty_tensors(MAX_TENSORS + 2)), "10002 tensors, more than 10000"),
    "a duplicate name": (DUPLICATE, "duplicate name"),
    "a hole": (pack({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "invalid safetensors"),
    "an overlap": (pack({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "invalid"),
    "offsets past the end": (pack({"a": entry(0, 4000)}, bytes(4)), "invalid safetensors"),
    "offsets backwards": (pack({"a": entry(4, 0, [1])}, bytes(4)), "invalid safetensors"),
    "a shape of other size": (pack({"a": entry(0, 4, [2])}, bytes(4)), "invalid safetensors"),
    "a shape that overflows": (pack({"a": entry(0, 4, [2**62, 4, 1])}, bytes(4)), "invalid"),
    "a negative shape": (pack({"a": entry(0, 4, [-1])}, bytes(4)), "invalid safetensors"),
    "an unknown dtype": (pack({"a": entry(0, 4, [1], "F31")}, bytes(4)), "invalid safetensors"),
    "a missing field": (pack({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "invalid"),
    "a header that is a list": (pack([1, 2]), "not a JSON object"),
    "a header that is not JSON": (pack(b"{'a': 1}"), "invalid JSON"),
    "a header in no encoding": (pack(b'{"\xff": 1}'), "invalid JSON"),
    "a header nested deep": (pack(b'{"a":' * 100_000 + b"}" * 100_000), "invalid JSON"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "not safetensors"),
    "a zip": (b"PK\x03\x04" + bytes(100), "not safetensors"),
}


def test_a_valid_file_is_read(tmp_path):
    got = parse_tensors(tmp_path, VALID)
    assert got.keys() == TENSORS.keys()
    assert all(torch.equal(got[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("case", INVALID)
def test_invalid_tensors_are_refused_with_their_reason(tmp_path, case):
    raw, reason = INVALID[case]
    with pytest.raises(CheckpointRefused, match=re.escape(reason)) as caught:
        parse_tensors(tmp_path / "file", raw)
    assert caught.value.path == tmp_path / "file"
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@settings(max_examples=400)
@given(st.data())
def test_a_changed_byte_is_refused_or_gives_tensors_that_fit_the_bytes(tmp_path_factory, data):
    raw = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors = parse_tensors(tmp_path_factory.getbasetemp(), bytes(raw))
    except CheckpointRefused:
        return
    assert sum(t.nbytes for t in tensors.values()) == sum(t.nbytes for t in TENSORS.values())


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "invalid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate name"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON"),
        (b'{"a": 99999999999999999999}', "invalid JSON: Integer exceeds 64-bit range"),
        (b'{"a": "\\ud83d"}', "invalid JSON: .*surrogates not allowed"),
        (b'{"\\ud800": 1}', "invalid JSON: .*surrogates not allowed"),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "invalid JSON: Recursion limit"),
        (b"[" * 100_000, "invalid JSON"),
        ('{"a": 1}'.encode("utf-16"), "invalid JSON"),
    ],
    ids=[
        *("nothing", "a list", "a duplicate name", "5,000 digits", "65 bits", "half a pair"),
        *("half a pair in a name", "300 deep", "100,000 deep", "UTF-16"),
    ],
)
def test_invalid_json_is_refused_with_its_reason(tmp_path, raw, reason):
    with pytest.raises(CheckpointRefused, match=reason):
        parse_json(tmp_path, raw)


def fifo(path):
    os.mkfifo(path)


def link(path):
    target = path.with_name("target")
    target.write_bytes(b"12345")
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fifo, "not a plain file"),
        (lambda path: path.mkdir(), "cannot be opened: Is a directory"),
        (link, "cannot be opened: a symbolic link: put the file itself there"),
        (lambda path: path.symlink_to("nowhere"), "cannot be opened: a symbolic link"),
        (lambda _path: None, "cannot be opened: No such file"),
        (lambda path: path.write_bytes(bytes(101)), "101 bytes, more than 100"),
    ],
    ids=["fifo", "folder", "link", "dangling link", "missing", "too long"],
)
@pytest.mark.timeout(10)
def test_what_is_not_a_plain_file_within_the_limit_is_refused(tmp_path, make, reason):
    make(tmp_path / "file")
    with pytest.raises(CheckpointRefused, match=reason):
        read_once(tmp_path / "file", 100)


def test_a_file_up_to_the_limit_is_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    assert read_once(tmp_path / "file", 100) == bytes(100)


@pytest.mark.parametrize("size", [0, 50, 99, 101, 10_000])
def test_a_file_that_changes_its_size_while_it_is_read_is_refused(tmp_path, size):
    """A profiler's hook changes the file at the worst moment: when its size has just been read."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100))

    def change(_frame, event, called):
        if event == "c_return" and called is os.fstat:
            os.truncate(path, size)

    sys.setprofile(change)
    try:
        with pytest.raises(CheckpointRefused, match="changed while it was being read"):
            read_once(path, 1000)
    finally:
        sys.setprofile(None)
    assert path.stat().st_size == size


def test_a_file_swapped_after_it_was_opened_is_read_from_the_one_descriptor(tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"old")
    other.write_bytes(b"new and longer")

    def swap(_frame, event, called):
        if event == "c_return" and called is os.open:
            other.replace(path)

    sys.setprofile(swap)
    try:
        raw = read_once(path, 1000)
    finally:
        sys.setprofile(None)
    assert raw == b"old"
    assert path.read_bytes() == b"new and longer"


def test_a_file_is_written_once_and_replaced_whole(tmp_path):
    path = tmp_path / "file"
    write_durably(path, b"first")
    with pytest.raises(FileExistsError):
        write_durably(path, b"second")
    replace_durably(path, b"third")
    assert path.read_bytes() == b"third"
    assert list(tmp_path.iterdir()) == [path]

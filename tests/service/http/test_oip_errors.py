"""Open Inference Protocol v2, sent wrong: refused, with which status, in the protocol's words."""

import base64
import json
import struct

import httpx
import numpy as np
import pytest

from tests.helpers import PNG

MLP = "digits-mlp"
INFER = f"/v2/models/{MLP}/infer"
ROWS_OF_ONES = [[[1, 1], [1, 1]]]
SIZED = {"parameters": {"binary_data_size": 4}}


def request(shape=(1, 2, 2), datatype="UINT8", data=ROWS_OF_ONES, **more):
    found = {"name": "image", "shape": list(shape), "datatype": datatype, "data": data}
    return {"inputs": [found | more.pop("input", {})], **more}


def outputs(*names, **parameters):
    return {"outputs": [{"name": name, "parameters": parameters} for name in names]}


def raw(data):
    """A JSON request with its data as it stands."""
    return json.dumps(request(data="DATA")).replace('"DATA"', data).encode()


PNG64 = base64.b64encode(PNG).decode()
REFUSED = {
    "nothing": (400, b""),
    "no JSON": (400, b"MARKER"),
    "nesting 100,000 deep": (400, b'{"inputs":' + b"[" * 100_000),
    "an integer of 4,000 digits": (422, raw("[1, 1, 1, " + "9" * 4000 + "]")),
    "a key twice": (400, b'{"id": "a", "id": "MARKER"}'),
    "NaN": (422, raw("[1, 1, 1, NaN]")),
    "a lone surrogate": (422, request(id="\ud800MARKER")),
    "a lone surrogate as a key": (422, b'{"\\ud800MARKER": []}'),
    "too long": (413, b'{"id": "' + b"A" * 1_100_000 + b'"}'),
    "nesting 500 deep": (422, raw("[" * 500 + "]" * 500)),
    "a list": (422, []),
    "no inputs": (422, {}),
    "an empty list of inputs": (422, {"inputs": []}),
    "two inputs": (422, {"inputs": request()["inputs"] * 2}),
    "many unknown keys": (422, request(**{f"MARKER{n}": 1 for n in range(9_000)})),
    "a million keys": (413, request(**{f"MARKER{n}": 1 for n in range(50_000)})),
    "another model than the path's": (422, request(model_name="MARKER")),
    "a model that is a number": (422, request(model_name=5)),
    "another version than the path's": (422, request(model_version="1")),
    "many dimensions": (422, request(shape=[0] * 50_000)),
    "many outputs": (422, request() | outputs(*["MARKER"] * 4_000)),
    "an unknown key": (422, request(MARKER1=1)),
    "an id that is a number": (422, request(id=5)),
    "another name": (422, request(input={"name": "MARKER"})),
    "an unknown key of the input": (422, request(input={"MARKER1": 1})),
    "shared memory": (422, request(input={"parameters": {"shared_memory_region": "MARKER"}})),
    "an unknown datatype": (422, request(datatype="MARKER")),
    "no data": (422, request(data=None)),
    "data that is text": (422, request(data="MARKER")),
    "data and a size": (422, request(input=SIZED)),
    "a size without binary data": (400, request(data=None, input=SIZED)),
    "no shape": (422, request(shape=())),
    "no shape of BYTES": (422, request((), "BYTES", [PNG64])),
    "two dimensions": (422, request(shape=(2, 2), data=[1] * 4)),
    "five dimensions": (422, request(shape=(1, 2, 2, 1, 1))),
    "two channels": (422, request(shape=(1, 1, 2, 2), data=[1] * 4)),
    "channels first": (422, request(shape=(1, 3, 2, 2), data=[1] * 12)),
    "two columns of BYTES": (422, request((1, 2), "BYTES", [PNG64, PNG64])),
    "a zero dimension": (422, request(shape=(1, 0, 2), data=[])),
    "no images": (422, request(shape=(0, 2, 2), data=[])),
    "a dimension that is true": (422, request(shape=(True, 2, 2))),
    "a dimension with a point": (422, request(shape=(1.0, 2, 2))),
    "a product that overflows": (413, request(shape=(4, 2**31, 2**31))),
    "a product that overflows to zero": (413, request(shape=(1, 2**32, 2**32))),
    "a dimension beyond 64 bits": (413, request(shape=(1, 2**70, 1))),
    "too many images": (413, request(shape=(65, 1, 1), data=[1] * 65)),
    "too many encoded images": (413, request((65,), "BYTES", [PNG64] * 65)),
    "a picture 20,000 wide": (413, request(shape=(1, 1, 20_000))),
    "less data than the shape says": (422, request(shape=(1, 2, 3))),
    "more data than the shape says": (422, request(shape=(1, 1, 2))),
    "flat data that does not fit": (422, request(data=[1, 1, 1])),
    "nested as another shape": (422, request(data=[[1, 1, 1, 1]])),
    "rows of different lengths": (422, request(data=[[[1, 1], [1]]])),
    "a number for a row": (422, request(data=[[[1, 1], 1]])),
    "texts as pixels": (422, request(data=["1"] * 4)),
    "truth values": (422, request(data=[True] * 4)),
    "256": (422, request(data=[1, 1, 1, 256])),
    "-1": (422, request(data=[1, 1, 1, -1])),
    "UINT8 with a point": (422, request(data=[1, 1, 1, 1.5])),
    "a scale for encoded images": (422, request((1,), "BYTES", [PNG64], parameters={"scale": 1})),
    "BYTES that are numbers": (422, request((1,), "BYTES", [5])),
    "BYTES that are no base64": (422, request((1,), "BYTES", ["MARKER!"])),
    "BYTES that are no picture": (415, request((1,), "BYTES", ["TUFSS0VS"])),
    "BYTES that are empty": (400, request((1,), "BYTES", [""])),
    "BYTES that are cut": (422, request((1,), "BYTES", [PNG64[:64]])),
    "one bad element of two": (422, request((2,), "BYTES", [PNG64, PNG64[:64]])),
    "fewer BYTES than the shape says": (422, request((2,), "BYTES", [PNG64])),
    "an unknown output": (422, request() | outputs("MARKER")),
    "an output twice": (422, request() | outputs("label", "label")),
    "classification": (422, request() | outputs("label", classification=3)),
    "binary data of 1": (422, request() | outputs("label", binary_data=1)),
    "an output of another mode": (422, request(parameters={"mode": "predict"}) | outputs("mean")),
    **{
        f"parameters {json.dumps(given)[:60]}": (422, request(parameters=given))
        for given in (
            [],
            {"MARKER1": 1},
            {"mode": "MARKER"},
            {"mode": "predict", "samples": 5},
            {"samples": 5},
            {"mode": "uncertainty", "include_samples": True},
            {"binary_data_output": "true"},
            *({"mode": "uncertainty", "samples": n} for n in (0, -1, 10**9, True, "5", 5.0)),
            *({"scale": n} for n in (0, 2, 256, True, "255", 255.0)),
            *({"timeout": n} for n in (-1, 2**63, 0.5, "5", True)),
            {"priority": []},
            {"sequence_id": {"MARKER": 1}},
            *({"mode": "uncertainty", "seed": n} for n in (-1, 2**63, 10**400, "0")),
            *({"mode": "uncertainty", "level": n} for n in (0, 1, -1, "0.5", True)),
            {"mode": "uncertainty", "masks": "MARKER"},
        )
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_in_the_words_of_the_protocol(case, http, protocol_error):
    status, body = REFUSED[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert protocol_error(http.post(INFER, content=content), status)
    assert http.post(INFER, json=request()).status_code == 200


def binary(
    size=None, tail=bytes(4), shape=(1, 2, 2), datatype="UINT8", length=None, scale=255, **more
):
    """A request with binary data, of which each part can be made wrong: content and headers."""
    size = len(tail) if size is None else size
    found = {"name": "image", "shape": list(shape), "datatype": datatype}
    inputs = [found | {"parameters": {"binary_data_size": size}} | more]
    header = json.dumps({"inputs": inputs, "parameters": {"scale": scale}})
    shown = str(len(header)) if length is None else length
    return header.encode() + tail, [("Inference-Header-Content-Length", shown)]


def floats(*numbers):
    return binary(tail=struct.pack("<4f", *numbers), datatype="FP32")


def elements(tail, count=1):
    return binary(tail=tail, shape=(count,), datatype="BYTES")


def element(data, length=None):
    return struct.pack("<I", len(data) if length is None else length) + data


ELEMENT = element(PNG)
MALFORMED = {
    "a size that is more": (400, binary(5)),
    "a size that is less": (400, binary(3)),
    "a size of zero": (400, binary(0)),
    "a negative size": (422, binary(-4)),
    "a size that is true": (422, binary(True)),
    "more data than the shape says": (400, binary(tail=bytes(5))),
    "less data than the shape says": (400, binary(tail=bytes(3))),
    "no binary data": (400, binary(tail=b"")),
    "bytes for floats": (400, binary(datatype="FP32")),
    "floats for bytes": (400, binary(tail=bytes(16))),
    "data that no input names": (422, binary(tail=bytes(4), parameters={})),
    "data in both places": (422, binary(data=[1] * 4)),
    "binary data beside JSON's": (400, binary(parameters={}, data=[1] * 4)),
    "a product that overflows": (413, binary(shape=(4, 2**31, 2**31))),
    "NaN": (422, floats(1, 1, 1, np.nan)),
    "infinity": (422, floats(1, 1, 1, np.inf)),
    "above the scale": (422, binary(tail=bytes([0, 1, 1, 2]), scale=1)),
    "BYTES without a length": (400, elements(PNG)),
    "BYTES cut in the length": (400, elements(ELEMENT[:3])),
    "BYTES cut in the data": (400, elements(ELEMENT[:-1])),
    "an element too many": (400, elements(ELEMENT * 2)),
    "an element too few": (400, elements(ELEMENT, 2)),
    "an element of 4 GB": (400, elements(element(b"MARKER", 2**32 - 1))),
    "an empty element": (400, elements(element(b""))),
    "base64 in an element": (415, elements(element(PNG64.encode()))),
    "a length of zero": (400, binary(length="0")),
    "a negative length": (400, binary(length="-1")),
    "a length with a sign": (400, binary(length="+5")),
    "a length that is no number": (400, binary(length="MARKER")),
    "an empty length": (400, binary(length="")),
    "a length beyond the body": (400, binary(length="100000")),
    "a length of 5,000 digits": (400, binary(length="9" * 5000)),
    "a length of a superscript": (400, binary(length="\xb2".encode("latin-1"))),
    "a length that cuts the JSON": (400, binary(length="20")),
    "a length that is all of it": (400, binary(length=str(len(binary()[0])))),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_sizes_of_binary_data_are_held_to(case, http, protocol_error):
    status, (content, headers) = MALFORMED[case]
    assert protocol_error(http.post(INFER, content=content, headers=headers), status)
    good, headers = binary()
    assert http.post(INFER, content=good, headers=headers).status_code == 200


def test_two_lengths_are_refused(http, protocol_error):
    content, headers = binary()
    protocol_error(http.post(INFER, content=content, headers=[*headers, *headers]), 400)


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("Content-Type", "", 200),
        ("Content-Type", "application/octet-stream", 200),
        ("Content-Type", "Application/JSON ; charset=utf-8", 200),
        ("Content-Type", "text/plain", 415),
        ("Content-Encoding", "gzip", 415),
        ("Inference-Header-Content-Length", str(len(json.dumps(request()))), 200),
        ("Inference-Header-Content-Length", str(len(json.dumps(request())) + 1), 400),
    ],
)
def test_headers_say_how_a_body_is_read(name, value, status, http, protocol_error):
    response = http.post(INFER, content=json.dumps(request()), headers={name: value})
    assert response.status_code == 200 if status == 200 else protocol_error(response, status)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/MARKER", 404),
        ("POST", "/v2", 405),
        ("GET", INFER, 405),
        ("GET", "/v2/models/MARKER", 404),
        ("POST", "/v2/models/MARKER/infer", 404),
        ("POST", f"/v2/models/{MLP}/versions/9/infer", 404),
        ("GET", f"/v2/models/{MLP}/versions/0/ready", 404),
        ("GET", "/v2/models/..%2f..%2fMARKER", 404),
        ("POST", "/v2/models/%00MARKER/infer", 404),
        ("GET", f"/v2/models/{MLP}/config", 404),
    ],
)
def test_unknown_routes_methods_models_and_versions(method, path, status, http, protocol_error):
    url = httpx.URL(http.base_url, raw_path=path.encode())
    protocol_error(http.request(method, url, json=request() if method == "POST" else None), status)


def test_limits_of_time_and_size_are_those_of_the_other_routes(tight_server, protocol_error):
    with httpx.Client(base_url=tight_server.url) as http:
        protocol_error(http.post(INFER, content=b"[" + b" " * 70_000), 413)

    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{"
    late = tight_server.exchange(head.encode())
    assert late.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":"the body did not arrive within 0.5 seconds"}' in late

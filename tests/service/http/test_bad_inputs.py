"""Bodies and parameters that are refused, over a socket: with which status, and saying what."""

import base64
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.helpers import PNG, encode

BASE64 = base64.b64encode(PNG).decode()
FORM = "multipart/form-data; boundary="
FILE = b'Content-Disposition: form-data; name="file"; filename="MARKER.png"\r\n'


def form(*parts, boundary=b"cut", end=b"--\r\n"):
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    return body + b"--" + boundary + end


def part(headers=FILE, data=PNG):
    return headers + b"\r\n" + data


GOOD_FORM = form(part())
FIELD = part(b'Content-Disposition: form-data; name="file"\r\n')
MULTIPART = {
    "no boundary": (400, "multipart/form-data", GOOD_FORM),
    "wrong boundary": (400, FORM + "other", GOOD_FORM),
    "empty boundary": (400, FORM, GOOD_FORM),
    "empty quoted boundary": (400, FORM + '""', GOOD_FORM),
    "boundary of 300 bytes": (400, FORM + "b" * 300, form(part(), boundary=b"b" * 300)),
    "1,200 files": (400, FORM + "cut", form(*[part(data=b"x")] * 1200)),
    "1,200 fields": (400, FORM + "cut", form(*[FIELD] * 1200)),
    "100 files": (413, FORM + "cut", form(*[part()] * 100)),
    "no part": (400, FORM + "cut", b"--cut--\r\n"),
    "nothing": (400, FORM + "cut", b""),
    "no name": (400, FORM + "cut", form(part(b'Content-Disposition: form-data; filename="a"\r\n'))),
    "no disposition": (400, FORM + "cut", form(part(b"Content-Type: image/png\r\n"))),
    "no headers": (400, FORM + "cut", form(b"\r\n" + PNG)),
    "header of 10 kB": (400, FORM + "cut", form(part(FILE + b"X: " + b"a" * 10_000 + b"\r\n"))),
    "100 headers": (400, FORM + "cut", form(part(FILE + b"X: a\r\n" * 100))),
    "nested": (
        400,
        FORM + "cut",
        form(part(FILE + b"Content-Type: multipart/mixed; boundary=in\r\n", form(part()))),
    ),
    "no terminator": (400, FORM + "cut", form(part(), end=b"")),
    "half a terminator": (400, FORM + "cut", form(part(), end=b"-")),
    "cut in a header": (400, FORM + "cut", b"--cut\r\nContent-Disp"),
    "no filename": (422, FORM + "cut", form(FIELD)),
    "another name": (422, FORM + "cut", form(part(FILE.replace(b'"file"', b'"MARKER"')))),
    "an empty file": (400, FORM + "cut", form(part(data=b""))),
    "one bad file of two": (422, FORM + "cut", form(part(), part(data=PNG[:50]))),
    "a part of another type": (415, FORM + "cut", form(part(FILE + b"Content-Type: a/b\r\n"))),
    "giant preamble": (413, FORM + "cut", b"a" * 1_100_000 + b"\r\n" + GOOD_FORM),
    "giant epilogue": (413, FORM + "cut", GOOD_FORM + b"a" * 1_100_000),
}


def numbers(value):
    return json.dumps({"instances": [value]}).encode()


ROWS = [[1] * 8] * 8
JSON = {
    "nothing": (400, b""),
    "no JSON": (400, b"MARKER"),
    "nesting 100,000 deep": (400, b'{"images":' + b"[" * 100_000),
    "closed nesting 100,000 deep": (400, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nesting 500 deep": (422, numbers(json.loads("[" * 500 + "]" * 500))),
    "invalid UTF-8": (400, b'{"images": ["\xff"]}'),
    "UTF-16": (400, json.dumps({"images": [BASE64]}).encode("utf-16")),
    "UTF-16 without a mark": (400, json.dumps({"images": [BASE64]}).encode("utf-16-le")),
    "a byte order mark": (400, b"\xef\xbb\xbf" + json.dumps({"images": [BASE64]}).encode()),
    "an integer of 5,000 digits": (400, b'{"instances": [[[' + b"9" * 5000 + b"]]]}"),
    "an integer of 4,000 digits": (422, b'{"instances": [[[' + b"9" * 4000 + b"]]]}"),
    "a key twice": (400, b'{"images": [], "images": ["MARKER"]}'),
    "a key twice within": (400, b'{"images": [{"a": 1, "a": 2}]}'),
    "NaN": (422, b'{"instances": [[[NaN]]]}'),
    "Infinity": (422, b'{"instances": [[[Infinity]]]}'),
    "-Infinity": (422, b'{"instances": [[[-Infinity]]]}'),
    "1e999": (422, b'{"instances": [[[1e999]]]}'),
    "a lone surrogate as a key": (422, b'{"\\ud800MARKER": []}'),
    "a lone surrogate as an image": (422, b'{"images": ["\\ud800MARKER"]}'),
    "strings as numbers": (422, numbers([["1"] * 8] * 8)),
    "truth values": (422, numbers([[True] * 8] * 8)),
    "a truth value among numbers": (422, numbers([[1, True], [2, 3]])),
    "null": (422, numbers([[None, 1], [2, 3]])),
    "an object": (422, numbers([[{"MARKER": 1}]])),
    "rows of different lengths": (422, numbers([[1, 2], [3]])),
    "a number for a row": (422, numbers([[1, 2], 3])),
    "no rows": (422, numbers([])),
    "no columns": (422, numbers([[], []])),
    "no channels": (422, numbers([[[], []], [[], []]])),
    "two channels": (422, numbers([[[1, 2]]])),
    "four dimensions": (422, numbers([[[[1]]]])),
    "256": (422, numbers([[256]])),
    "-1": (422, numbers([[-1]])),
    "bad base64": (422, b'{"images": ["MARKER!"]}'),
    "base64 without padding": (422, json.dumps({"images": [BASE64.rstrip("=") + "a"]}).encode()),
    "base64 of no picture": (415, b'{"images": ["TUFSS0VS"]}'),
    "an empty image": (400, b'{"images": [""]}'),
    "a number as an image": (422, b'{"images": [5]}'),
    "images that is a string": (422, b'{"images": "MARKER"}'),
    "no images": (400, b'{"images": []}'),
    "too many images": (413, json.dumps({"images": [BASE64] * 65}).encode()),
    "both": (422, json.dumps({"images": [BASE64], "instances": [ROWS]}).encode()),
    "a scale that is not there": (422, b'{"instances": [[[1]]], "scale": 2}'),
    "a scale that is true": (422, b'{"instances": [[[1]]], "scale": true}'),
    "a scale that is null": (422, b'{"instances": [[[1]]], "scale": null}'),
    "a scale alone": (422, b'{"scale": 1}'),
    "a scale for encoded pictures": (422, json.dumps({"images": [BASE64], "scale": 1}).encode()),
    "options in the body": (422, json.dumps({"images": [BASE64], "samples": 5}).encode()),
    "a list": (422, b'["MARKER"]'),
    "a string": (422, b'"MARKER"'),
    "an empty object": (422, b"{}"),
    "a million names": (413, json.dumps({str(n): 1 for n in range(90_000)}).encode()),
    "a million empty lists": (413, b'{"instances": [' + b"[]," * 350_000 + b"[]]}"),
    "too long": (413, b'{"images": ["' + b"A" * 1_100_000 + b'"]}'),
    "strings that NumPy would pad to 200 GB": (
        422,
        numbers([["A" * 500_000, *[""] * 9], *[[""] * 10] * 10_000]),
    ),
}
MEDIA = {
    "no content type": (415, None),
    "text": (415, "text/plain"),
    "a form": (415, "application/x-www-form-urlencoded"),
    "other JSON": (415, "application/MARKER+json"),
    "a media type of a picture": (415, "image/MARKER"),
    "nonsense": (415, ";;;="),
}
PARAMETERS = {
    "/uncertainty": [
        *("samples=0", "samples=-1", "samples=1000000000", "samples=true", 'samples="5"'),
        "samples=5&samples=6",
        *("samples=", "samples=MARKER", "samples=1e2", "samples=" + "9" * 5000, "samples=٣"),
        *("seed=-1", "seed=9223372036854775808", "seed=1.5", "seed=nan"),
        *("masks=MARKER", "level=0", "level=1", "level=nan", "level=inf", "level=-1"),
        *("include_samples=MARKER", "MARKER1=1", "sampels=5", "passes=3"),
    ],
    "/compare": ["passes=0", "passes=33", "seed=-1", "samples=5", "MARKER1=1"],
    "/predict": ["samples=5", "MARKER1=1", "MARKER-", "scale=0", "scale=MARKER", "scale=true"],
}


def post(http, body, content_type="image/png", path="/predict", **more):
    headers = {"Content-Type": content_type} if content_type else {}
    return http.post(path, content=body, headers=headers | more)


@pytest.fixture(autouse=True)
def _still_serving(http):
    yield
    assert post(http, PNG).status_code == 200


@pytest.mark.parametrize("case", MULTIPART)
def test_multipart(case, http, problem):
    status, content_type, body = MULTIPART[case]
    problem(post(http, body, content_type), status)


def test_a_sound_form_of_several_files_is_a_batch(http):
    body = form(part(), part(data=encode(Image.new("L", (8, 8), 0))), part())
    first, second, third = post(http, body, FORM + "cut").json()["predictions"]
    assert first == third != second


@pytest.mark.parametrize("case", JSON)
def test_json(case, http, problem):
    status, body = JSON[case]
    problem(post(http, body, "application/json"), status)


@pytest.mark.parametrize("case", MEDIA)
def test_media_types(case, http, problem):
    status, content_type = MEDIA[case]
    problem(post(http, PNG, content_type), status)


@pytest.mark.parametrize("coding", ["gzip", "br", "MARKER", "gzip, identity"])
def test_a_compressed_body_is_refused(coding, http, problem):
    problem(post(http, PNG, **{"Content-Encoding": coding}), 415)


@pytest.mark.parametrize(
    ("path", "query"), [(path, query) for path, all_ in PARAMETERS.items() for query in all_]
)
def test_parameters(path, query, http, problem):
    detail = problem(post(http, PNG, path=f"{path}?{query}"), 422)
    assert detail


@pytest.mark.parametrize(
    "name",
    [
        *("MARKER", "..%2f", "..%2fdigits-mlp", "%2e%2e", "%00", "digits-mlp%00", "%ff", "%20"),
        *("digits-mlp%2f1", "%2fetc%2fpasswd", "DIGITS-MLP", "a" * 5000, "digits-mlp;x", "%"),
        *(f"digits-mlp/versions/{n}" for n in ("0", "01", "3", "9" * 5000, "%D9%A3", "MARKER")),
    ],
)
def test_a_name_or_a_version_that_is_not_there(name, http, problem):
    # not through httpx's own normalisation: the path goes out as it stands
    for method, end in (("GET", ""), ("POST", "/predict")):
        url = httpx.URL(http.base_url, raw_path=f"/v1/models/{name}{end}".encode())
        problem(http.request(method, url, content=PNG), 404)


def test_the_limits_of_numbers_themselves_are_allowed(http):
    answers = [
        post(http, PNG, path="/uncertainty?samples=1&seed=9223372036854775807&level=0.000001"),
        post(http, PNG, path="/compare?passes=1&seed=0"),
        post(http, numbers(np.full((8, 8, 1), 255).tolist()), "application/json"),
        post(http, numbers([[0.0, 255, 127.5]]), "application/json"),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4

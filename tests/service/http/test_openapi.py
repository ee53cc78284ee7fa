"""Schemathesis asks a server what its own OpenAPI document says, and more: all checks.

`make test` asks each route a few things; `make test-openapi` many, of a server with API keys and an
admin token. What a schema cannot say is excused by name, in `EXCUSES`.
"""

import base64
import copy
import io
import os
import tempfile
from collections.abc import Callable

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import Case
from schemathesis.specs.openapi.checks import positive_data_acceptance

from dropserve.service.app import create_app
from dropserve.service.http.openapi import shortest_path
from dropserve.service.http.routes.oip import HEADER
from dropserve.service.settings import Settings

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "0"))
"""Of each route, where there are many; `make test-openapi` sets it."""
KEY, TOKEN = "a-key-for-this-test", "a-token-for-this-test"
KEYS = tempfile.NamedTemporaryFile("w", prefix="keys-")  # noqa: SIM115  as long as the module
print(KEY, file=KEYS, flush=True)
SECURED = {"api_keys_file": KEYS.name, "admin_token": TOKEN, "max_images": 3, "max_samples": 50}
GIVEN = SECURED if EXAMPLES else {}
KINDS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}


@st.composite
def image_files(draw, kind):
    mode = draw(st.sampled_from(["RGB", "RGBA", "L", "P", "1"] if kind == "PNG" else ["RGB"]))
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    file = io.BytesIO()
    Image.new(mode, size, draw(st.sampled_from([0, 1]))).save(file, kind)
    return file.getvalue()


for media_type, kind in KINDS.items():
    schemathesis.openapi.media_type(media_type, image_files(kind))
in_base64 = st.sampled_from(list(KINDS.values())).flatmap(image_files).map(base64.b64encode)
schemathesis.openapi.format("image-in-base64", in_base64.map(bytes.decode))


# What a document cannot say. Each is a reason to refuse what the schema allows.


def scale_of_a_file(case: Case) -> bool:
    """`scale=1` is for numbers: whether a body has numbers, no parameter's schema can ask."""
    body = case.body if isinstance(case.body, dict) else {}
    scales = {str((case.query or {}).get("scale")), str(body.get("scale"))}
    return "1" in scales and "instances" not in body


def scale_twice(case: Case) -> bool:
    """It may be in the query or in the body, and no schema spans both."""
    return isinstance(case.body, dict) and "scale" in case.body and "scale" in (case.query or {})


def numbers(case: Case) -> bool:
    """Rows must be of one length, and no number above `scale` or all of a picture's below 1."""
    if not isinstance(case.body, dict) or "instances" not in case.body:
        return False
    scale = case.body.get("scale", (case.query or {}).get("scale", 255))
    return not all(fits(picture, int(scale)) for picture in case.body["instances"])


def fits(picture: list, scale: int) -> bool:
    if len({len(row) for row in picture}) != 1:
        return False
    cells = [cell if isinstance(cell, list) else [cell] for row in picture for cell in row]
    flat = [number for cell in cells for number in cell]
    scaled = max(flat) <= 1 and any(number % 1 for number in flat)
    same = len({isinstance(cell, list) for row in picture for cell in row}) == 1
    return (
        same and len({*map(len, cells)}) == 1 and max(flat) <= scale and not (scale > 1 and scaled)
    )


def binary_data(case: Case) -> bool:
    """What comes before it says its size, and a header the size of that."""
    return case.media_type == "application/octet-stream"


def no_filename(case: Case) -> bool:
    """A part must have a filename; Schemathesis sends some without."""
    return case.media_type == "multipart/form-data"


def forms_of_integers(case: Case) -> bool:
    """JSON Schema takes 5.0 for an integer; and Schemathesis compares those of 63 bits rounded."""
    body = case.body if isinstance(case.body, dict) else {}
    options = {"scale": body.get("scale"), **(body.get("parameters") or {}), **(case.query or {})}
    whole = [value for name, value in options.items() if name not in ("level", "p")]
    return any(isinstance(n, float) or (isinstance(n, int) and n > 2**53) for n in whole)


EXCUSES: list[Callable[[Case], bool]] = [
    scale_of_a_file,
    scale_twice,
    numbers,
    binary_data,
    no_filename,
    forms_of_integers,
]


def fit(case: Case) -> None:
    """Make a tensor's data fit its shape, and outputs and options the mode: no schema can."""
    body = case.body
    case.headers.pop(HEADER, None)  # where no binary data follows
    body["inputs"][0] |= {"shape": [1, 2, 2], "datatype": "UINT8", "data": [0, 1, 1, 0]}
    body["inputs"][0].pop("parameters", None)
    for name in ("model_name", "model_version"):
        body.pop(name, None)
    if body.get("outputs"):
        body["outputs"] = list({output["name"]: output for output in body["outputs"]}.values())
    if body.get("parameters"):
        body["parameters"]["mode"] = "uncertainty"
        body["parameters"].pop("samples", None)  # some outputs need twenty


def name_the_images(part: object) -> None:
    """Say, in our word, what strings of base64 are to be made of."""
    for inner in (
        part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    ):
        name_the_images(inner)
    if isinstance(part, dict) and part.get("contentEncoding") == "base64":
        part["format"] = "image-in-base64"


SETTINGS = Settings(**GIVEN)
DOCUMENT = copy.deepcopy(create_app(SETTINGS).openapi())  # its examples are shared
name_the_images(DOCUMENT)
SHORTEST = {shortest_path(path) for path in DOCUMENT["paths"]}
schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.checks.negative_data_rejection.expected_statuses.append("413")  # too much, not wrong
if not EXAMPLES:
    schema.config.phases.update(phases=["examples", "fuzzing"])
    schema = schema.include(
        lambda context: shortest_path(context.operation.path) == context.operation.path
    )


@schema.hook
def map_path_parameters(context, path_parameters):
    """Name a version that is there, most times; none is to be unloaded."""
    served = {"name": "digits-mlp", "version": "1"}
    asked = path_parameters or {}
    if context.operation.path.startswith("/v2/repository") or len(str(asked)) % 4 == 0:
        return path_parameters
    return {name: served.get(name, value) for name, value in asked.items()}


@pytest.fixture(scope="module")
def asked(request):
    """The server that is asked."""
    if not EXAMPLES:
        return request.getfixturevalue("server")
    return request.getfixturevalue("make_server")(**GIVEN).start()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES or 2,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_every_route_does_as_the_document_says(case, asked):
    headers = {}
    if EXAMPLES:
        admin = case.path.startswith("/v2/repository")
        headers = {"Authorization": f"Bearer {TOKEN if admin else KEY}", "X-API-Key": KEY}
    check(case, asked.url, headers)


def check(case: Case, url: str, headers: dict[str, str]) -> None:
    """Send a request, and hold the answer to all checks but those that are excused."""
    right = case.meta.generation.mode.is_positive
    if right and case.path.endswith("/infer") and isinstance(case.body, dict):
        fit(case)
    excused = right and any(excuse(case) for excuse in EXCUSES)
    case.call_and_validate(
        url,
        headers=headers,
        excluded_checks=[positive_data_acceptance] if excused else [],
    )

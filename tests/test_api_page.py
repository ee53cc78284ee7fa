"""The OpenAPI document and the page made from it are whole, and show what a service answers."""

import json
import re
import runpy
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from dropserve.service.app import create_app
from dropserve.service.http.keys import OPEN
from dropserve.service.http.openapi import examples, shortest_path
from dropserve.service.settings import Settings
from tests.helpers import dropserve

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-examples"  # noqa: S105  opens nothing
DOCUMENT = create_app(Settings()).openapi()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}


def schema_of(content: dict[str, Any]) -> dict[str, Any]:
    return {**content["schema"], "components": DOCUMENT["components"]}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_says_what_it_does_answers_and_how_it_fails(name):
    operation = OPERATIONS[name]
    assert operation["summary"]
    assert operation["description"]
    errors = {s: r for s, r in operation["responses"].items() if s >= "400"}
    assert "500" in errors
    protocol = name.partition(" ")[2].startswith("/v2")
    kind = "ProtocolError" if protocol else "Problem"
    media_type = "application/json" if protocol else "application/problem+json"
    for status, response in errors.items():
        assert HTTPStatus(int(status))
        assert response["description"]
        reference = {"$ref": f"#/components/schemas/{kind}"}
        assert response["content"] == {media_type: {"schema": reference}}
    answers = [r for s, r in operation["responses"].items() if s < "400"]
    assert [r["description"] for r in answers]
    for media_type, content in answers[0]["content"].items():
        assert "example" in content or media_type in ("image/png", "application/octet-stream")
        if media_type == "application/json":
            jsonschema.validate(content["example"], schema_of(content))


def body_of(document, operation):
    """The body of an operation, which several may share."""
    body = operation["requestBody"]
    shared = document["components"]["requestBodies"]
    return shared[body["$ref"].rpartition("/")[2]] if "$ref" in body else body


@pytest.mark.parametrize("name", [n for n, o in OPERATIONS.items() if "requestBody" in o])
def test_every_body_has_an_example_that_its_schema_allows(name):
    content = body_of(DOCUMENT, OPERATIONS[name])["content"]["application/json"]
    jsonschema.validate(content["example"], schema_of(content))


def test_only_a_service_with_keys_says_that_they_are_needed_and_not_by_its_probes(tmp_path):
    assert "securitySchemes" not in DOCUMENT["components"]
    assert not any("security" in operation for operation in OPERATIONS.values())
    (tmp_path / "keys").write_text("a-key")
    given = Settings(api_keys_file=tmp_path / "keys", admin_token=TOKEN)
    document = create_app(given).openapi()
    schemes = document["components"]["securitySchemes"]
    assert {s["type"] + s.get("scheme", "") for s in schemes.values()} == {
        *("httpbearer", "apiKey", "httpbasic"),
    }
    for path, item in document["paths"].items():
        for operation in item.values():
            needed = operation.get("security")
            if path in OPEN:
                assert needed is None
            elif path.startswith("/v2/repository"):
                assert needed == [{"adminToken": [], "keyAsHeader": []}]
            else:
                assert [*map(list, needed)] == [["keyAsBearer"], ["keyAsHeader"], ["keyAsPassword"]]
            for status in ("401", "429"):
                assert (status in operation["responses"]) == (path not in OPEN)


def test_limits_in_the_document_are_those_of_the_service():
    document = create_app(Settings(max_images=3, max_samples=50)).openapi()
    post = document["paths"]["/uncertainty"]["post"]
    (samples,) = [p["schema"] for p in post["parameters"] if p["name"] == "samples"]
    assert (samples["maximum"], samples["default"]) == (50, 50)
    content = body_of(document, post)["content"]
    for kind in content["application/json"]["schema"]["anyOf"]:
        jsonschema.Draft202012Validator.check_schema(kind)
        name = kind["required"][0]
        item = "aGk=" if name == "images" else [[0, 255.0]]
        for right in ({name: [item]}, {name: [item] * 3, "scale": 1}):
            assert jsonschema.Draft202012Validator(kind).is_valid(right)
        many, unknown, odd = (
            {name: [item] * 4},
            {name: [item], "seed": 5},
            {name: [item], "scale": 2},
        )
        for wrong in ({name: []}, many, unknown, odd):
            assert not jsonschema.Draft202012Validator(kind).is_valid(wrong)
    assert content["multipart/form-data"]["schema"]["properties"]["file"]["maxItems"] == 3
    assert "image/webp" in content["multipart/form-data"]["encoding"]["file"]["contentType"]
    stream = document["paths"]["/uncertainty/stream"]["post"]
    form = body_of(document, stream)["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["file"]["maxItems"] == 1
    events = stream["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]["oneOf"]
    assert [event["properties"]["event"]["const"] for event in events] == [
        *("start", "sample", "end", "error")
    ]
    infer = document["paths"]["/v2/models/{name}/infer"]["post"]
    for message in (infer["requestBody"], infer["responses"]["200"]):
        assert set(message["content"]) == {"application/json", "application/octet-stream"}
    for path in ("/readyz", "/healthz", "/v2/health/ready"):
        assert "503" in document["paths"][path]["get"]["responses"]


def test_no_example_is_of_a_route_that_is_not_there():
    routes = {f"{n.partition(' ')[0]} {shortest_path(n.partition(' ')[2])}" for n in OPERATIONS}
    assert set(examples()) == {r for r in routes if not r.endswith("{number}")}


@pytest.fixture(scope="module")
def answered(tmp_path_factory, make_server):
    """What a service with the digits model answers now, by the script that asks for examples."""
    root = tmp_path_factory.mktemp("examples")
    dropserve("train", "--epochs", 1, "--samples", 2, "--checkpoints", root)
    server = make_server(root, default_model=None, admin_token=TOKEN).start()
    ask = runpy.run_path(str(ROOT / "docs/examples.py"))["ask"]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        return dict(ask(client))


@pytest.mark.parametrize("name", examples())
def test_examples_are_built_as_a_service_answers(name, answered):
    shown, now = examples()[name], answered[name]
    assert now.get("sent") == shown.get("sent")
    assert form(now["answer"]) == form(shown["answer"])


def form(value: object) -> object:
    """How an answer is built: its fields, and the types and number of values."""
    if isinstance(value, dict):
        return {key: form(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [form(inner) for inner in value]
    if isinstance(value, str) and value.startswith("# HELP "):
        return set(re.findall(r"^dropserve_\w+", value, re.MULTILINE))
    if isinstance(value, str) and value.startswith("event: "):
        events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", value)
        return [(event, form(json.loads(data))) for event, data in events]
    return "number" if value is None or isinstance(value, int | float) else "text"


def test_the_page_has_the_tables_of_the_document():
    page = (ROOT / "docs/api.md").read_text()
    write = runpy.run_path(str(ROOT / "docs/generate.py"))["write"]
    assert page == write(page, DOCUMENT), "make docs writes it anew"

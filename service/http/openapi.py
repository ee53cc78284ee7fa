"""The OpenAPI document: what the framework derives from the routes, and what it cannot know.

That is bodies that are read by hand, errors, limits, keys, and examples. The page at `/docs` shows
it. The examples are what a service was sent and answered: `docs/examples.py` writes them.
"""

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from starlette.responses import Response

from dropserve.service.errors import error_for
from dropserve.service.http.images import FORMATS
from dropserve.service.http.keys import OPEN
from dropserve.service.http.options import OPTIONS
from dropserve.service.http.request_log import is_protocol
from dropserve.service.http.routes.oip import (
    HEADER,
    IndexRequest,
    InferRequest,
    LoadRequest,
    ProtocolError,
    UnloadRequest,
)
from dropserve.service.schemas import EVENTS, SCALES, Problem
from dropserve.service.settings import Settings

_UNDERIVED: tuple[type[BaseModel], ...] = (
    *(Problem, *EVENTS.values(), ProtocolError),
    *(InferRequest, IndexRequest, LoadRequest, UnloadRequest),
)
"""Types that the framework does not see, because it neither reads nor writes them."""
_WHICH = re.compile(
    r"^/v1/models/\{name}(/versions/\{version})?(?=/("
    + "|".join(OPTIONS)
    + r"))|/versions/\{version}"
)
"""The part of a path that says which model is asked; the answer is built the same."""
_KEYS = {
    "keyAsBearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "keyAsHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "keyAsPassword": {"type": "http", "scheme": "basic", "description": "Of any user."},
}
_EXAMPLES = Path(__file__).with_name("examples.json")
_ADMIN = {"adminToken": {"type": "http", "scheme": "bearer", "description": "The admin token."}}


def complete_document(app: FastAPI, settings: Settings) -> None:
    """Complete an application's document: what its routes take and answer, and how they fail."""
    derive = app.openapi
    app.servers = [{"url": "."}]  # relative to the document's URL: for proxies that add a prefix

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(derive(), settings)
        return derive()

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does it
    if settings.docs:
        page = _docs_page()

        @app.get("/docs", include_in_schema=False)
        async def docs() -> Response:
            return page


def _docs_page() -> Response:
    """Make the page of the document, with a policy that allows no script but its own."""
    static = "static-offline-docs"  # mounted by FastAPIOffline
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Dropserve: API",
        swagger_js_url=f"{static}/swagger-ui-bundle.js",
        swagger_css_url=f"{static}/swagger-ui.css",
        swagger_favicon_url="playground/icon.svg",
    )
    (script,) = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    digest = b64encode(sha256(script).digest()).decode()
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    return page


def shortest_path(path: str) -> str:
    """Return the shortest path that answers alike: without the model, or without the version."""
    return _WHICH.sub("", path)


@cache
def examples() -> Mapping[str, Mapping[str, Any]]:
    """Read the examples: what was `sent` and the `answer`, by method and shortest path."""
    found: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("examples.json").read_text()
    )
    return found


def _complete(document: dict[str, Any], settings: Settings) -> None:
    components = document["components"]
    schemas = components["schemas"]
    for model in _UNDERIVED:
        found = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(found.pop("$defs", {}), **{model.__name__: found})
    for name in ("HTTPValidationError", "ValidationError"):  # the framework's, never sent
        schemas.pop(name, None)
    _limit(schemas["InferParameters"]["properties"]["samples"], settings.max_samples)
    components["requestBodies"] = {
        "Image": _images_body(1),
        "Images": _images_body(settings.max_images),
    }
    for body in components["requestBodies"].values():
        _show(body, examples()["POST /predict"]["sent"])
    schemes = {
        **(_KEYS if settings.api_keys_file else {}),
        **(_ADMIN if settings.admin_token else {}),
    }
    if schemes:
        components["securitySchemes"] = schemes
    for path, item in document["paths"].items():
        for method, operation in item.items():
            _complete_operation(method, path, operation, settings)


def _complete_operation(
    method: str, path: str, operation: dict[str, Any], settings: Settings
) -> None:
    keys = settings.api_keys_file is not None and path not in OPEN
    admin = path.startswith("/v2/repository")
    if admin and settings.admin_token is not None:  # takes the Authorization header
        operation["security"] = [{"adminToken": [], **({"keyAsHeader": []} if keys else {})}]
    elif keys:
        operation["security"] = [{name: []} for name in _KEYS]
    declared = operation["responses"]
    answers = {status: r for status, r in declared.items() if status < "400"}
    # not the 422 that the framework makes up
    failed = {s for s, r in declared.items() if s >= "400" and "ValidationError" not in str(r)}
    failed |= {"500", *(["401"] if keys or admin else []), *(["429"] if keys else [])}
    operation["responses"] = answers | {s: _error(path, int(s)) for s in sorted(failed)}
    for parameter in operation.get("parameters", ()):
        if parameter["name"] == "samples":
            _limit(parameter["schema"], settings.max_samples)
    if path.endswith("/infer"):
        _add_binary(operation)
    example = examples().get(f"{method.upper()} {shortest_path(path)}", {})
    _show(operation.get("requestBody", {}), example.get("sent"))
    for response in answers.values():
        if "text/event-stream" in response["content"]:
            # a field of OpenAPI 3.2, which tools for 3.1 ignore
            response["content"]["text/event-stream"]["itemSchema"] = _events()
        _show(response, example.get("answer"))


def _limit(schema: dict[str, Any], most: int) -> None:
    schema |= {"maximum": most, "default": min(schema["default"], most)}


def _images_body(most: int) -> dict[str, Any]:
    """Describe the bodies that so many images come in, as `body.py` reads them."""
    file = {"schema": {"type": "string", "format": "binary"}}
    count = {"minItems": 1, "maxItems": most}
    scale = {"type": "integer", "enum": list(SCALES), "description": "As in the query."}
    base64 = {"type": "string", "contentEncoding": "base64", "minLength": 1}
    number: Any = {"type": "number", "minimum": 0, "maximum": 255}
    channels = [{"type": "array", "items": number, "minItems": n, "maxItems": n} for n in (1, 3)]
    pixels = {
        "description": "HxW or HxWxC, C 1 or 3; numbers 0 to 255, or to `scale`.",
        "anyOf": [_rows(item) for item in (number, *channels)],
    }
    json = {
        "anyOf": [
            _closed({"images": {"type": "array", "items": base64, **count}, "scale": scale}),
            _closed({"instances": {"type": "array", "items": pixels, **count}, "scale": scale}),
        ]
    }
    form = _closed({"file": {"type": "array", "items": file["schema"], **count}})
    encoding = {"file": {"contentType": ", ".join((*FORMATS, "application/octet-stream"))}}
    return {
        "required": True,
        "content": {
            **dict.fromkeys(FORMATS, file),
            "multipart/form-data": {"schema": form, "encoding": encoding},
            "application/json": {"schema": json},
        },
    }


def _rows(item: Mapping[str, Any]) -> dict[str, Any]:
    row = {"type": "array", "items": item, "minItems": 1}
    return {"type": "array", "items": row, "minItems": 1}


def _closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Describe an object that needs its first property, and has no others than these."""
    first = next(iter(properties))
    fields = {"properties": properties, "required": [first], "additionalProperties": False}
    return {"type": "object", **fields}


def _add_binary(operation: dict[str, Any]) -> None:
    """Describe the extension for binary tensor data, which sends JSON and what follows it."""
    text = "JSON as in application/json, and after it the binary data of tensors."
    body = {"schema": {"type": "string", "format": "binary", "description": text}}
    text = "Bytes of the JSON, where binary data follows it."
    length = {"schema": {"type": "integer", "minimum": 1}, "description": text}
    named = {"name": HEADER, "in": "header", "required": False, **length}
    operation.setdefault("parameters", []).append(named)
    operation["requestBody"]["content"]["application/octet-stream"] = body
    response = operation["responses"]["200"]
    response["content"]["application/octet-stream"] = body
    response["headers"] = {HEADER: length}


def _events() -> dict[str, Any]:
    """Describe each event of a stream by its name and its data, as OpenAPI 3.2 has it."""
    data = {event: _reference(kind) for event, kind in {**EVENTS, "error": Problem}.items()}
    return {
        "oneOf": [
            {
                "type": "object",
                "required": ["event", "data"],
                "properties": {
                    "event": {"const": event},
                    "data": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": schema,
                    },
                },
            }
            for event, schema in data.items()
        ]
    }


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _error(path: str, status: int) -> dict[str, Any]:
    """Describe an error: its class says what it means."""
    content: Any = {"application/problem+json": {"schema": _reference(Problem)}}
    if is_protocol(path):
        content = {"application/json": {"schema": _reference(ProtocolError)}}
    meaning = (type(error_for(status, "")).__doc__ or "").partition("\n")[0]
    return {"description": meaning, "content": content}


def _show(message: Mapping[str, Any], example: object) -> None:
    """Put an example beside the schema of what is sent or answered."""
    for media_type in ("application/json", "text/event-stream", "text/plain"):
        content = message.get("content", {}).get(media_type)
        if example is not None and content is not None:
            content["example"] = example

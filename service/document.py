"""The OpenAPI document: what the framework derives from the routes, with all errors and examples.

The page at `/docs` shows it. The examples are what a service was sent and answered;
`docs/examples.py` asked it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

from service.errors import error_for, written
from service.keys import OPEN
from service.protocol import ProtocolError
from service.schemas import Problem

_EXAMPLES = Path(__file__).with_name("examples.json")
_SHOWN = ("application/json", "text/event-stream", "text/plain")
_WHICH = re.compile(r"^/v1/models/\{name}(/versions/\{version})?(?=/[puc])|/versions/\{version}")
"""The part of a path that says which model is asked; the answer is built the same."""
_DERIVED = ("HTTPValidationError", "ValidationError")
"""What the framework believes to answer to a bad request."""
_SERVER = {"url": "."}
"""Relative to the document's own URL: right behind a proxy that adds a prefix, too."""


def complete_document(app: FastAPI) -> None:
    """Let an application's document say of every route how it fails and what it answers."""
    derive = app.openapi
    app.servers = [_SERVER]

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(derive())
        return derive()

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does it

    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        static = "static-offline-docs"  # mounted by FastAPIOffline
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="Dropserve: API",
            swagger_js_url=f"{static}/swagger-ui-bundle.js",
            swagger_css_url=f"{static}/swagger-ui.css",
            swagger_favicon_url="playground/icon.svg",
        )


def common(path: str) -> str:
    """Return the shortest path that answers alike: of the default model, or the latest version."""
    return _WHICH.sub("", path)


@cache
def examples() -> Mapping[str, Mapping[str, Any]]:
    """Read the examples: what was `sent` and the `answer`, by method and common path."""
    found: dict[str, dict[str, Any]] = json.loads(_EXAMPLES.read_text())
    return found


def _complete(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for model in (Problem, ProtocolError):
        schemas.setdefault(model.__name__, model.model_json_schema())
    for path, item in document["paths"].items():
        for method, operation in item.items():
            responses = operation["responses"]
            success = {status: r for status, r in responses.items() if status < "400"}
            operation["responses"] = success | _errors(path, _declared(responses))
            example = examples().get(f"{method.upper()} {common(path)}", {})
            _show(operation.get("requestBody", {}), example.get("sent"))
            for response in success.values():
                _show(response, example.get("answer"))
    for name in _DERIVED:
        schemas.pop(name, None)


def _declared(responses: Mapping[str, Any]) -> Iterable[int]:
    """Yield the errors that a route declares, and not the one that the framework makes up."""
    for status, response in responses.items():
        if status >= "400" and _DERIVED[0] not in str(response):
            yield int(status)


def _errors(path: str, declared: Iterable[int]) -> dict[str, Any]:
    """Describe a route's errors. Any route may fail, and any but a probe may want a key."""
    statuses = {*declared, 500} | (set() if path in OPEN else {401})
    media_type = written(path, 500, "", "")[1]
    kind = Problem if media_type == "application/problem+json" else ProtocolError
    content = {media_type: {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    return {
        str(status): {"description": _meaning(status), "content": content}
        for status in sorted(statuses)
    }


def _meaning(status: int) -> str:
    return (type(error_for(status, "")).__doc__ or "").partition("\n")[0]


def _show(message: Mapping[str, Any], example: object) -> None:
    """Put an example beside the schema of what is sent or answered."""
    for media_type, content in message.get("content", {}).items():
        if example is not None and media_type in _SHOWN:
            content["example"] = example

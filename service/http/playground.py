"""The playground: one page at `/`, its files at `/playground/...`; no build, nothing foreign."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

_PAGE = "index.html"
_TYPES = {  # by hand: what a machine knows of file names differs, and nosniff takes us at our word
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, and asked about each time: a new version shows at once
}


class _Files(StaticFiles):
    """The folder's files, with the page's policy on every answer and ETags for the browser."""

    def file_response(self, full_path: Any, *args: Any, **kwargs: Any) -> Response:  # noqa: ANN401
        """Answer with a file, or with 304 if the browser has it."""
        response = super().file_response(full_path, *args, **kwargs)
        response.headers.update(_HEADERS)
        if "content-type" in response.headers:
            response.headers["content-type"] = _TYPES.get(
                Path(full_path).suffix, "application/octet-stream"
            )
        return response


_files = _Files(directory=Path(__file__).parent.parent / "playground", check_dir=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """Show the page."""
    return await _files.get_response(_PAGE, request.scope)


@router.api_route("/playground/{path:path}", methods=["GET", "HEAD"])
async def file(request: Request, path: str) -> Response:
    """Send one of its files; the page itself has one address."""
    if path in ("", _PAGE):
        return RedirectResponse("../")
    return await _files.get_response(path, request.scope)

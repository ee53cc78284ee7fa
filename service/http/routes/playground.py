"""The playground: one page at `/`, its files at `/playground/...`; nothing from other servers."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

_TYPES = {  # not from the machine's tables, which differ: nosniff makes browsers rely on them
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-cache",  # revalidated each time: a new version shows at once
}


class _Files(StaticFiles):
    """The folder's files, with the page's policy on every response, beside the server's headers."""

    def file_response(self, full_path: Any, *args: Any, **kwargs: Any) -> Response:  # noqa: ANN401
        response = super().file_response(full_path, *args, **kwargs)
        response.headers.update(_HEADERS)
        if "content-type" in response.headers:
            found = _TYPES.get(Path(full_path).suffix, "application/octet-stream")
            response.headers["content-type"] = found
        return response


_files = _Files(directory=Path(__file__).parents[2] / "playground", check_dir=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """Send the page."""
    return await _files.get_response("index.html", request.scope)


@router.api_route("/playground/{path:path}", methods=["GET", "HEAD"])
async def file(request: Request, path: str) -> Response:
    """Send one of its files; the page itself has one address."""
    if path in ("", "index.html"):
        return RedirectResponse("../")
    return await _files.get_response(path, request.scope)

"""Routes that stand in front of the framework: what is asked so often that its work would show."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from dropserve.service.errors import InvalidRequest
from dropserve.service.http.request_log import RequestLog


class Front(ABC):
    """ASGI application: answers POST on some paths, and leaves the rest to another one.

    Args:
        behind: gets every other path and method.

    Attributes:
        paths: whole paths; named groups become `scope["path_params"]`.
    """

    paths: ClassVar[re.Pattern[str]]

    def __init__(self, behind: ASGIApp) -> None:
        self._behind = behind
        self._logged = RequestLog(self._answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and scope["method"] == "POST":
            found = self.paths.fullmatch(scope["path"])
            if found is not None:
                scope["path_params"] = found.groupdict()
                await self._logged(scope, receive, send)
                return
        await self._behind(scope, receive, send)

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request on one of the paths."""


def invalid(error: ValidationError) -> InvalidRequest:
    """Say what pydantic found wrong, once each, and nothing of what was sent."""
    return InvalidRequest("; ".join(sorted(set(map(_describe, error.errors())))))


def _describe(error: Mapping[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    return f"{where}: {error['msg']}" if where else error["msg"]

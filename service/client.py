"""A typed client of the service, synchronous and asynchronous. No torch, no NumPy, no FastAPI.

What to send, how to read the answer and whether to try again is decided in `service.calls`; the two
clients only send and sleep.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self, TypedDict, Unpack

import httpx

from service import schemas
from service.calls import Answer, Backoff, Call, Images, model_path, post, reaching

DEFAULT_URL = "http://127.0.0.1:8000"


class Target(TypedDict, total=False):
    """Which model answers; left out: the service's default one, and its latest version."""

    model: str | None
    version: int | None


class Sampling(Target, total=False):
    """Meaning and defaults are those of `schemas.UncertaintyOptions`."""

    samples: int
    seed: int
    masks: schemas.MaskKind
    level: float
    include_samples: bool


class Comparing(Target, total=False):
    """Meaning and defaults are those of `schemas.CompareOptions`."""

    passes: int
    seed: int


class DropserveClient:
    """Talks to a running service.

    Methods raise a `service.errors.DropserveError`: `Unreachable` where no answer came, else the
    one that the answer's status stands for, with its `request_id`. An image given as a path is
    read at once, and raises `OSError` where it cannot be.

    Args:
        url: where the service listens.
        retries: how often a 503 is tried again, after `Retry-After` and a random back-off.
        max_wait: seconds to wait between tries in all; what would take longer is given up at once.
        timeout: seconds for a connection, and for each read and write.
        transport, sleep: what sends and what waits, for tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 5,
        max_wait: float = 30.0,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        with reaching(url):
            self._http = httpx.Client(base_url=url, timeout=timeout, transport=transport)
        self._url, self._retries, self._max_wait, self._sleep = url, retries, max_wait, sleep

    def predict(self, images: Images, **target: Unpack[Target]) -> schemas.PredictResponse:
        """Classify images in eval mode."""
        return self._answer(post("predict", schemas.PredictResponse, images, target))

    def uncertainty(self, images: Images, **how: Unpack[Sampling]) -> schemas.UncertaintyResponse:
        """Classify images with many thinned networks: mean, variance, and where doubt is from."""
        return self._answer(post("uncertainty", schemas.UncertaintyResponse, images, how))

    def compare(self, images: Images, **how: Unpack[Comparing]) -> schemas.CompareResponse:
        """Run images in eval mode and, `passes` times, in train mode."""
        return self._answer(post("compare", schemas.CompareResponse, images, how))

    def models(self) -> schemas.ModelList:
        """List the models that are served."""
        return self._answer(Call("GET", "/v1/models", schemas.ModelList))

    def model(self, name: str, version: int | None = None) -> schemas.ModelDetails:
        """Describe a model: its classes, input, dropout sites and evaluation."""
        return self._answer(Call("GET", model_path(name, version), schemas.ModelDetails))

    def ready(self) -> bool:
        """Say if the service is there and takes requests; where it is not is no error."""
        with suppress(httpx.RequestError):
            return self._http.get("/readyz").is_success
        return False

    def close(self) -> None:
        """Close the connections; leaving a `with` block does the same."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _answer(self, call: "Call[Answer]") -> Answer:
        backoff = Backoff(self._retries, self._max_wait)
        while True:
            with reaching(self._url):
                response = self._http.send(call.request(self._http))
            if (delay := backoff.after(response)) is None:
                return call.parse(response)
            self._sleep(delay)


class AsyncDropserveClient:
    """`DropserveClient` for asyncio: the same arguments, methods, answers and errors."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 5,
        max_wait: float = 30.0,
        timeout: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        with reaching(url):
            self._http = httpx.AsyncClient(base_url=url, timeout=timeout, transport=transport)
        self._url, self._retries, self._max_wait, self._sleep = url, retries, max_wait, sleep

    async def predict(self, images: Images, **target: Unpack[Target]) -> schemas.PredictResponse:
        """Classify images in eval mode."""
        return await self._answer(post("predict", schemas.PredictResponse, images, target))

    async def uncertainty(
        self, images: Images, **how: Unpack[Sampling]
    ) -> schemas.UncertaintyResponse:
        """Classify images with many thinned networks: mean, variance, and where doubt is from."""
        return await self._answer(post("uncertainty", schemas.UncertaintyResponse, images, how))

    async def compare(self, images: Images, **how: Unpack[Comparing]) -> schemas.CompareResponse:
        """Run images in eval mode and, `passes` times, in train mode."""
        return await self._answer(post("compare", schemas.CompareResponse, images, how))

    async def models(self) -> schemas.ModelList:
        """List the models that are served."""
        return await self._answer(Call("GET", "/v1/models", schemas.ModelList))

    async def model(self, name: str, version: int | None = None) -> schemas.ModelDetails:
        """Describe a model: its classes, input, dropout sites and evaluation."""
        return await self._answer(Call("GET", model_path(name, version), schemas.ModelDetails))

    async def ready(self) -> bool:
        """Say if the service is there and takes requests; where it is not is no error."""
        with suppress(httpx.RequestError):
            return (await self._http.get("/readyz")).is_success
        return False

    async def close(self) -> None:
        """Close the connections; leaving a `with` block does the same."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _answer(self, call: "Call[Answer]") -> Answer:
        backoff = Backoff(self._retries, self._max_wait)
        while True:
            with reaching(self._url):
                response = await self._http.send(call.request(self._http))
            if (delay := backoff.after(response)) is None:
                return call.parse(response)
            await self._sleep(delay)

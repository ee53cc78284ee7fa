"""A typed client of the service, synchronous and asynchronous. No torch, no NumPy, no FastAPI.

What to send, how to read the answer and whether to try again is decided in `calls`; the two clients
only send and sleep.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, closing, suppress
from typing import Any, Self, TypedDict, Unpack

import httpx

from dropserve.service import schemas
from dropserve.service.calls import (
    Answer,
    Backoff,
    Call,
    EventReader,
    Image,
    Images,
    base_url,
    credentials,
    error_of,
    get,
    get_bytes,
    get_text,
    model_path,
    post,
    reaching,
    stream,
)
from dropserve.service.schemas import StreamEvent

DEFAULT_URL = "http://127.0.0.1:8000"


class Target(TypedDict, total=False):
    """Which model answers; left out: the service's default one, and the version that answers."""

    model: str | None
    version: int | None


class Streaming(Target, total=False):
    """Meaning and defaults are those of `schemas.UncertaintyOptions`."""

    samples: int
    seed: int
    masks: schemas.MaskKind
    level: float


class Sampling(Streaming, total=False):
    """Meaning and defaults are those of `schemas.UncertaintyOptions`."""

    include_samples: bool


class Comparing(Target, total=False):
    """Meaning and defaults are those of `schemas.CompareOptions`."""

    passes: int
    seed: int
    p: float | None


class DropserveClient:
    """Talks to a running service.

    Methods raise a `DropserveError`: `Unreachable` where no answer came, else the one that the
    answer's status stands for, with its `request_id`. An image given as a path is read at once, and
    raises `OSError` where it cannot be.

    Args:
        url: where the service listens, http:// or https://.
        retries: how often a 503 is tried again, after `Retry-After` and a random back-off.
        max_wait: seconds to wait between tries in all; what would take longer is given up at once.
        timeout: seconds for a connection, and for each read and write.
        api_key: one of the service's, where it asks for one.
        transport, sleep: what sends and what waits, for tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 5,
        max_wait: float = 30.0,
        timeout: float = 60.0,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        with reaching(url):
            self._http = httpx.Client(
                base_url=base_url(url),
                timeout=timeout,
                transport=transport,
                headers=credentials(api_key),
            )
        self._url, self._retries, self._max_wait, self._sleep = url, retries, max_wait, sleep

    def predict(self, images: Images, **target: Unpack[Target]) -> schemas.PredictResponse:
        """Classify images in eval mode."""
        return self._answer(post("predict", schemas.PredictResponse, images, target))

    def uncertainty(self, images: Images, **how: Unpack[Sampling]) -> schemas.UncertaintyResponse:
        """Classify images with many thinned networks: mean, variance, and where doubt is from."""
        return self._answer(post("uncertainty", schemas.UncertaintyResponse, images, how))

    def uncertainty_stream(self, image: Image, **how: Unpack[Streaming]) -> Iterator[StreamEvent]:
        """Stream one image's thinned networks as they run: a start, the samples, an end.

        Leaving the loop over it early gives the work up.
        """
        reader = EventReader()
        with reaching(self._url), closing(self._send(stream(image, how))) as response:
            for piece in response.iter_bytes():
                yield from reader.feed(piece)
        reader.finish()

    def compare(self, images: Images, **how: Unpack[Comparing]) -> schemas.CompareResponse:
        """Run images in eval mode and, `passes` times, in train mode."""
        return self._answer(post("compare", schemas.CompareResponse, images, how))

    def models(self) -> schemas.ModelList:
        """List the models that are served."""
        return self._answer(get("/v1/models", schemas.ModelList))

    def model(self, name: str, version: int | None = None) -> schemas.ModelDetails:
        """Describe a model: its classes, input, dropout sites and evaluation."""
        return self._answer(get(model_path(name, version), schemas.ModelDetails))

    def examples(self, name: str, version: int | None = None) -> schemas.ExampleList:
        """List the test pictures that a model brings along."""
        return self._answer(get(model_path(name, version, "examples"), schemas.ExampleList))

    def example(self, name: str, version: int, number: int) -> bytes:
        """Fetch one of a version's, counted from 0: a PNG that can be sent back as it is."""
        return self._answer(get_bytes(model_path(name, version, f"examples/{number}")))

    def metrics(self) -> str:
        """Fetch what Prometheus would, in its text format."""
        return self._answer(get_text("/metrics"))

    def readiness(self) -> schemas.Readiness:
        """Fetch which versions are ready, and which are refused; one 503 is `Overloaded`."""
        return self._answer(get("/readyz", schemas.Readiness, retried=False))

    def ready(self) -> bool:
        """Say if the service is there and takes requests; where it is not is no error."""
        return self._succeeds("/readyz")

    def live(self) -> bool:
        """Say if the service is there at all; where it is not is no error."""
        return self._succeeds("/livez")

    def close(self) -> None:
        """Close the connections; leaving a `with` block does the same."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _answer(self, call: Call[Answer]) -> Answer:
        return call.parse(self._send(call))

    def _send(self, call: Call[Any]) -> httpx.Response:
        backoff = Backoff(self._retries if call.retried else 0, self._max_wait)
        while True:
            with reaching(self._url):
                response = self._http.send(call.request(self._http), stream=call.streamed)
                if response.is_success:
                    return response
                response.read()
            if (delay := backoff.after(response)) is None:
                raise error_of(response)
            self._sleep(delay)

    def _succeeds(self, path: str) -> bool:
        with suppress(httpx.RequestError):
            return self._http.get(path).is_success
        return False


class AsyncDropserveClient:
    """`DropserveClient` for asyncio: the same arguments, methods, answers and errors."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 5,
        max_wait: float = 30.0,
        timeout: float = 60.0,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        with reaching(url):
            self._http = httpx.AsyncClient(
                base_url=base_url(url),
                timeout=timeout,
                transport=transport,
                headers=credentials(api_key),
            )
        self._url, self._retries, self._max_wait, self._sleep = url, retries, max_wait, sleep

    async def predict(self, images: Images, **target: Unpack[Target]) -> schemas.PredictResponse:
        """Classify images in eval mode."""
        return await self._answer(post("predict", schemas.PredictResponse, images, target))

    async def uncertainty(
        self, images: Images, **how: Unpack[Sampling]
    ) -> schemas.UncertaintyResponse:
        """Classify images with many thinned networks: mean, variance, and where doubt is from."""
        return await self._answer(post("uncertainty", schemas.UncertaintyResponse, images, how))

    async def uncertainty_stream(
        self, image: Image, **how: Unpack[Streaming]
    ) -> AsyncIterator[StreamEvent]:
        """Stream one image's thinned networks as they run: a start, the samples, an end.

        Closing it early (`contextlib.aclosing`) gives the work up.
        """
        reader = EventReader()
        with reaching(self._url):
            async with aclosing(await self._send(stream(image, how))) as response:
                async for piece in response.aiter_bytes():
                    for event in reader.feed(piece):
                        yield event
        reader.finish()

    async def compare(self, images: Images, **how: Unpack[Comparing]) -> schemas.CompareResponse:
        """Run images in eval mode and, `passes` times, in train mode."""
        return await self._answer(post("compare", schemas.CompareResponse, images, how))

    async def models(self) -> schemas.ModelList:
        """List the models that are served."""
        return await self._answer(get("/v1/models", schemas.ModelList))

    async def model(self, name: str, version: int | None = None) -> schemas.ModelDetails:
        """Describe a model: its classes, input, dropout sites and evaluation."""
        return await self._answer(get(model_path(name, version), schemas.ModelDetails))

    async def examples(self, name: str, version: int | None = None) -> schemas.ExampleList:
        """List the test pictures that a model brings along."""
        return await self._answer(get(model_path(name, version, "examples"), schemas.ExampleList))

    async def example(self, name: str, version: int, number: int) -> bytes:
        """Fetch one of a version's, counted from 0: a PNG that can be sent back as it is."""
        return await self._answer(get_bytes(model_path(name, version, f"examples/{number}")))

    async def metrics(self) -> str:
        """Fetch what Prometheus would, in its text format."""
        return await self._answer(get_text("/metrics"))

    async def readiness(self) -> schemas.Readiness:
        """Fetch which versions are ready, and which are refused; one 503 is `Overloaded`."""
        return await self._answer(get("/readyz", schemas.Readiness, retried=False))

    async def ready(self) -> bool:
        """Say if the service is there and takes requests; where it is not is no error."""
        return await self._succeeds("/readyz")

    async def live(self) -> bool:
        """Say if the service is there at all; where it is not is no error."""
        return await self._succeeds("/livez")

    async def close(self) -> None:
        """Close the connections; leaving a `with` block does the same."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _answer(self, call: Call[Answer]) -> Answer:
        return call.parse(await self._send(call))

    async def _send(self, call: Call[Any]) -> httpx.Response:
        backoff = Backoff(self._retries if call.retried else 0, self._max_wait)
        while True:
            with reaching(self._url):
                response = await self._http.send(call.request(self._http), stream=call.streamed)
                if response.is_success:
                    return response
                await response.aread()
            if (delay := backoff.after(response)) is None:
                raise error_of(response)
            await self._sleep(delay)

    async def _succeeds(self, path: str) -> bool:
        with suppress(httpx.RequestError):
            return (await self._http.get(path)).is_success
        return False

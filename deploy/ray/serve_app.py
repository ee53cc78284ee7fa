"""Dropserve under Ray Serve: replicas of the application, each with its own models.

Run it with `serve run deploy.ray.serve_app:app` in the project's folder; `rayservice.yaml` is for
Kubernetes. Settings are the environment's DROPSERVE_* of the replicas.
"""

from typing import TYPE_CHECKING

from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from fastapi import FastAPI

DRAIN_SECONDS = 20
"""That open requests get when a replica is replaced: as long as DROPSERVE_DRAIN_SECONDS is."""


def build() -> "FastAPI":
    """Make a replica's application from its environment; models are loaded when it starts."""
    from dropserve.service.app import create_app
    from dropserve.service.observability import logs
    from dropserve.service.server import security_headers
    from dropserve.service.settings import Settings

    settings = Settings()
    logs.configure(settings.log_level)
    app = create_app(settings)
    app.add_middleware(ServerHeaders, headers=security_headers(settings))
    return app


class ServerHeaders:
    """Adds what `dropserve serve` adds to every response, and leaves the request's id to Ray."""

    def __init__(self, app: ASGIApp, headers: list[tuple[str, str]]) -> None:
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [h for h in message["headers"] if h[0].lower() != b"x-request-id"]
                message["headers"] = own + self._headers
            await send(message)

        await self._app(scope, receive, send_with_headers)


@serve.deployment(
    autoscaling_config={
        "min_replicas": 2,
        "max_replicas": 8,
        # a batch runs while the next one fills: fewer would leave a core idle between them
        "target_ongoing_requests": 16,
        "upscale_delay_s": 10,
        "downscale_delay_s": 300,
    },
    max_ongoing_requests=256,  # beyond them a replica's own limits of waiting refuse with 503
    health_check_period_s=5,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=DRAIN_SECONDS,
    graceful_shutdown_wait_loop_s=0.5,
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress(build)
class Dropserve:
    """One replica.

    `revision` is of no effect, but another one has all replicas replaced, one after another.
    """

    def __init__(self, revision: str = "") -> None:
        self.revision = revision

    async def check_health(self) -> None:
        """Raise an error if the networks do not run any more: Ray then replaces the replica."""
        problem = self.app.state.inference.stalled()  # type: ignore[attr-defined]  # of the ingress
        if problem is not None:
            raise RuntimeError(problem)


app = Dropserve.bind()

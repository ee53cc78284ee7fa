"""Ray Serve: two replicas, dynamic request batching, HAProxy in front, no access log.

RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_THROUGHPUT_OPTIMIZED, in the table of servers, are its own
advice for throughput: HAProxy, which comes with it, hands requests to the replicas themselves.

https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html
https://docs.ray.io/en/latest/serve/advanced-guides/performance.html
https://docs.ray.io/en/master/kuberay/user-guides/serve-high-throughput.html
"""

import signal
import sys

import orjson
import ray
from classifier import BATCH, WAIT_SECONDS, WORKERS, Classifier
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=4 * BATCH)
class Deployment:
    """Decodes and runs a batch at once."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_SECONDS)
    async def predict(self, pngs: list[bytes]) -> list[bytes]:
        """Run the network over a batch."""
        return [
            orjson.dumps({"probabilities": p}, option=orjson.OPT_SERIALIZE_NUMPY)
            for p in self.classifier.predict(pngs)
        ]

    async def __call__(self, request: Request) -> Response:
        """Answer one picture."""
        body = await self.predict(await request.body())
        return Response(body, media_type="application/json")


if __name__ == "__main__":
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=int(sys.argv[1])),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    serve.run(Deployment.bind(), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()

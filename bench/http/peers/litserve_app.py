"""LitServe: two inference workers, as many API servers, batching, ZeroMQ between them.

Its requests are JSON or forms, so the picture comes as base64 in JSON, as in its own image example.
`fast_queue` is its advice above 100 requests a second.

https://lightning.ai/docs/litserve/features/batching
https://lightning.ai/docs/litserve/speed-up-serving-by-200x
https://lightning.ai/docs/litserve/api-reference/litserver
"""

import base64
import sys

import litserve as ls
import numpy as np
from classifier import BATCH, WAIT_SECONDS, WORKERS, Classifier


class Api(ls.LitAPI):
    """Decodes in `predict`, one batch at once."""

    def setup(self, device: str) -> None:  # noqa: ARG002  its signature
        """Load the network, once a worker."""
        self.classifier = Classifier()

    def decode_request(self, request: dict[str, str]) -> bytes:
        """Take the picture's bytes out of the request."""
        return base64.b64decode(request["image"])

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """Leave the pictures a list."""
        return inputs

    def predict(self, pngs: list[bytes]) -> np.ndarray:
        """Run the network over a batch."""
        return self.classifier.predict(pngs)

    def unbatch(self, output: np.ndarray) -> list[list[float]]:
        """Hand each request its row."""
        return output.tolist()

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        """Answer with JSON."""
        return {"probabilities": output}


if __name__ == "__main__":
    api = Api(max_batch_size=BATCH, batch_timeout=WAIT_SECONDS)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )

"""BentoML: two workers, adaptive batching, and uvloop and httptools, which it takes if there.

What is batchable takes a list, so the picture comes as base64 in a list of one, in JSON. A service
in front that takes the picture itself would cost another hop.

https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html
https://docs.bentoml.com/en/latest/build-with-bentoml/parallelize-requests.html
"""

import base64

import bentoml
from classifier import BATCH, WORKERS, Classifier

LATENCY_MS = 1000  # the goal above which it refuses requests; below it, the window adapts itself


@bentoml.service(workers=WORKERS, logging={"access": {"enabled": False}})
class Bento:
    """Decodes and runs a batch at once."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=LATENCY_MS)
    async def predict(self, images: list[str]) -> list[list[float]]:
        """Run the network over a batch."""
        return self.classifier.predict([base64.b64decode(image) for image in images]).tolist()

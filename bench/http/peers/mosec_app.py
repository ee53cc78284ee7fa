"""Mosec: two workers in one stage, the raw picture in, orjson out; with batching and without.

One stage, because decoding such a picture costs less than sending it to another process. Its
batcher waits for more at least a millisecond, also where there is one client; so Mosec is measured
with BENCH_BATCHED=0 too, which is its best for that client.

https://mosecorg.github.io/mosec/reference/interface.html
https://mosecorg.github.io/mosec/examples/pytorch.html
"""

import os

import numpy as np
import orjson
from classifier import BATCH, WAIT_SECONDS, WORKERS, Classifier
from mosec import Server, Worker


class Single(Worker):
    """Answers one picture at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = Classifier()

    def deserialize(self, data: bytes) -> bytes:
        """Leave the body as it is."""
        return data

    def forward(self, data: bytes) -> np.ndarray:
        """Run the network."""
        return self.classifier.predict([data])[0]

    def serialize(self, data: np.ndarray) -> bytes:
        """Answer with JSON."""
        return orjson.dumps({"probabilities": data}, option=orjson.OPT_SERIALIZE_NUMPY)


class Batched(Single):
    """Decodes and runs a batch at once."""

    def forward(self, data: list[bytes]) -> list[np.ndarray]:
        """Run the network over a batch."""
        return list(self.classifier.predict(data))


if __name__ == "__main__":
    server = Server()
    if os.environ["BENCH_BATCHED"] == "1":
        wait = round(1000 * WAIT_SECONDS)
        server.append_worker(Batched, num=WORKERS, max_batch_size=BATCH, max_wait_time=wait)
    else:
        server.append_worker(Single, num=WORKERS)
    server.run()

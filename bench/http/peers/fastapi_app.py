"""The hand-written service: FastAPI under uvicorn, two workers, uvloop, httptools, no access log.

`/predict` decodes and runs the network where the request is handled: at this network's size a
thread pool costs more than it frees. `/uncertainty` answers mean, variance and entropies of
BENCH_SAMPLES thinned networks, made by what BENCH_METHOD names: see `sampling.py`.

https://fastapi.tiangolo.com/deployment/server-workers/, https://www.uvicorn.org/settings/
"""

import os
import sys

import orjson
import torch
import uvicorn
from classifier import WORKERS, Classifier
from fastapi import FastAPI, Request, Response
from sampling import METHODS
from torch import Tensor

app = FastAPI()
classifier = Classifier()
method = os.environ.get("BENCH_METHOD")
sampled = METHODS[method](classifier.module, int(os.environ["BENCH_SAMPLES"])) if method else None


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Answer one picture in eval mode."""
    return answer({"probabilities": classifier.predict([await request.body()])[0]})


@app.post("/uncertainty")
async def uncertainty(request: Request) -> Response:
    """Answer one picture under Monte Carlo dropout."""
    with torch.inference_mode():
        p = sampled(classifier.batch([await request.body()]))[:, 0]  # [T, C]
        mean = p.mean(0)
        total, expected = entropy(mean), entropy(p).mean()
        return answer(
            {
                "mean": mean.numpy(),
                "variance": p.var(0).numpy(),
                "predictive_entropy": total.item(),
                "expected_entropy": expected.item(),
                "mutual_information": (total - expected).item(),
            }
        )


def entropy(p: Tensor) -> Tensor:
    """Entropy over the last dimension, in nats."""
    return torch.special.entr(p).sum(-1)


def answer(content: dict[str, object]) -> Response:
    """Write JSON; orjson takes float32 arrays as they are."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(
        "fastapi_app:app",
        port=int(sys.argv[1]),
        workers=WORKERS,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )

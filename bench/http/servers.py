"""The servers that take part, and how each is started and asked."""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.http.environments import Environment
from bench.http.processes import free_port

PEERS = Path(__file__).parent / "peers"
SAMPLES = 100
NEW_SEED = "NEW_SEED"  # as in post.lua

Task = Literal["predict", "uncertainty"]
Command = Callable[[str, int], list[str]]  # of the environment's bin folder and the port


@dataclass(frozen=True)
class Body:
    """How a picture is put into a request, and why not as it is, where it is not."""

    content_type: str = "image/png"
    wrap: Callable[[bytes], bytes] = lambda png: png
    note: str = ""


RAW = Body()


def _json(note: str, shape: Callable[[str], object]) -> Body:
    def wrap(png: bytes) -> bytes:
        return json.dumps(shape(base64.b64encode(png).decode())).encode()

    return Body("application/json", wrap, note)


@dataclass(frozen=True)
class Server:
    """One server doing one task.

    Attributes:
        name: what --only takes.
        label: what tables and plots say.
        environment: its virtual environment; None: the project's own.
        packages: whose versions are worth telling.
        path: with `NEW_SEED` where each request is to have a number of its own.
        probabilities: where the mean or the probabilities are in its answer.
        variance: where the variance is, if the task is uncertainty.
    """

    name: str
    label: str
    task: Task
    environment: Environment | None
    command: Command
    packages: tuple[str, ...]
    path: str = "/predict"
    body: Body = RAW
    probabilities: Callable[[Any], list[float]] = lambda answer: list(answer["probabilities"])
    variance: Callable[[Any], list[float]] = lambda answer: list(answer["variance"])
    variables: Mapping[str, str] = field(default_factory=dict)


def _script(name: str) -> Command:
    return lambda folder, port: [f"{folder}/python", str(PEERS / name), str(port)]


def _dropserve(folder: str, port: int) -> list[str]:
    return [f"{folder}/dropserve", "serve", "--port", str(port)]


def _mosec(folder: str, port: int) -> list[str]:
    options = ["--address", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    return [f"{folder}/python", str(PEERS / "mosec_app.py"), *options]


def _bentoml(folder: str, port: int) -> list[str]:
    where = ["--working-dir", str(PEERS), "--host", "127.0.0.1", "--port", str(port)]
    return [f"{folder}/bentoml", "serve", "bentoml_app:Bento", *where]


def _mlserver(folder: str, port: int) -> list[str]:
    ports = [f"MLSERVER_GRPC_PORT={free_port()}", f"MLSERVER_METRICS_PORT={free_port()}"]
    ports.append(f"MLSERVER_HTTP_PORT={port}")
    return ["env", *ports, f"{folder}/mlserver", "start", str(PEERS / "mlserver_model")]


def _uncertain(name: str, label: str, environment: str, packages: tuple[str, ...]) -> Server:
    """Describe the hand-written app with another way to sample."""
    return Server(
        name,
        label,
        "uncertainty",
        Environment(environment),
        _script("fastapi_app.py"),
        (*packages, "fastapi", "uvicorn"),
        path="/uncertainty",
        probabilities=lambda answer: list(answer["mean"]),
        variables={"BENCH_METHOD": name, "BENCH_SAMPLES": str(SAMPLES)},
    )


_OURS = {
    "DROPSERVE_WORKERS": "2",
    "DROPSERVE_LOG_LEVEL": "warning",
    "DROPSERVE_PRECISION": "float32",  # as all others
}


def _our_uncertainty(name: str, label: str, query: str = "") -> Server:
    """Describe Dropserve, asked for samples."""
    return Server(
        name,
        label,
        "uncertainty",
        None,
        _dropserve,
        ("dropserve",),
        path=f"/uncertainty?samples={SAMPLES}{query}",
        probabilities=lambda answer: list(answer["predictions"][0]["mean"]),
        variance=lambda answer: list(answer["predictions"][0]["variance"]),
        variables=_OURS,
    )


_OIP = "Open Inference Protocol: base64 in JSON"

SERVERS = (
    Server(
        "dropserve",
        "Dropserve",
        "predict",
        None,
        _dropserve,
        ("dropserve",),
        probabilities=lambda answer: list(answer["predictions"][0]["probabilities"]),
        variables=_OURS,
    ),
    Server(
        "fastapi",
        "FastAPI by hand",
        "predict",
        Environment("fastapi"),
        _script("fastapi_app.py"),
        ("fastapi", "uvicorn"),
    ),
    Server(
        "litserve",
        "LitServe",
        "predict",
        Environment("litserve"),
        _script("litserve_app.py"),
        ("litserve",),
        body=_json("takes JSON or forms: base64 in JSON", lambda image: {"image": image}),
    ),
    Server(
        "mosec",
        "Mosec",
        "predict",
        Environment("mosec"),
        _mosec,
        ("mosec",),
        path="/inference",
        variables={"BENCH_BATCHED": "1"},
    ),
    Server(
        "mosec-single",
        "Mosec, no batching",
        "predict",
        Environment("mosec"),
        _mosec,
        ("mosec",),
        path="/inference",
        variables={"BENCH_BATCHED": "0"},
    ),
    Server(
        "bentoml",
        "BentoML",
        "predict",
        Environment("bentoml"),
        _bentoml,
        ("bentoml",),
        body=_json("batches lists alone: base64 in JSON", lambda image: {"images": [image]}),
        probabilities=lambda answer: list(answer[0]),
        variables={"BENTOML_DO_NOT_TRACK": "True"},
    ),
    Server(
        "mlserver",
        "MLServer",
        "predict",
        Environment("mlserver"),
        _mlserver,
        ("mlserver",),
        path="/v2/models/classifier/infer",
        body=_json(
            _OIP,
            lambda image: {
                "inputs": [
                    {
                        "name": "image",
                        "shape": [1, 1],
                        "datatype": "BYTES",
                        "parameters": {"content_type": "base64"},
                        "data": [image],
                    }
                ]
            },
        ),
        probabilities=lambda answer: list(answer["outputs"][0]["data"]),
        variables={
            "MLSERVER_DEBUG": "false",
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_PARALLEL_WORKERS": "2",
        },
    ),
    Server(
        "ray",
        "Ray Serve",
        "predict",
        Environment("ray"),
        _script("ray_app.py"),
        ("ray",),
        variables={
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # its workers would yield to wrk, which no one else's do
        },
    ),
    _our_uncertainty("dropserve-uncertainty", "Dropserve"),
    _our_uncertainty("dropserve-new-seeds", "Dropserve, a new seed each", f"&seed={NEW_SEED}"),
    _uncertain("loop", f"loop of {SAMPLES} passes", "fastapi", ()),
    _uncertain("baal", "Baal", "baal", ("baal",)),
    _uncertain(
        "torch_uncertainty", "TorchUncertainty", "torch-uncertainty", ("torch-uncertainty",)
    ),
)

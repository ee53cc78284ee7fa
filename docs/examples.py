"""Asks a running service for the examples of the OpenAPI document: `service/http/examples.json`.

DROPSERVE_ADMIN_TOKEN=<16 letters> make serve, then with the same token python docs/examples.py
"""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs/images/three.png"
MODEL = "digits-mlp"

Example = dict[str, Any]


def ask(client: httpx.Client) -> Iterator[tuple[str, Example]]:
    """Send a request to every route, shortest path of those that answer alike.

    Args:
        client: of a service with the digits model alone; sends the admin token.

    Yields:
        Method and path as the document has them; what was sent, if anything, and the answer.
    """
    for operation, sent in _requests().items():
        method, _, path = operation.partition(" ")
        response = client.request(method, path.replace("{name}", MODEL), json=sent)
        response.raise_for_status()
        is_json = response.headers["content-type"] == "application/json"
        answer = response.json() if is_json else _shortened(response.text)
        yield operation.partition("?")[0], {"answer": answer} | ({"sent": sent} if sent else {})


def _requests() -> dict[str, Any]:
    """Return what is sent by method, path and query; in an order that leaves the model loaded."""
    picture = {"images": [base64.b64encode(PICTURE.read_bytes()).decode()]}
    with Image.open(PICTURE) as image:
        pixels = list(image.convert("L").tobytes())
        shape = [1, image.height, image.width]
    return {
        "GET /livez": None,
        "GET /readyz": None,
        "GET /healthz": None,
        "GET /v1/models": None,
        "GET /v1/models/{name}": None,
        "GET /v1/models/{name}/examples": None,
        "POST /predict": picture,
        "POST /uncertainty": picture,
        "POST /uncertainty/stream?samples=2": picture,
        "POST /compare?passes=2": picture,
        "GET /v2": None,
        "GET /v2/health/live": None,
        "GET /v2/health/ready": None,
        "GET /v2/models/{name}": None,
        "GET /v2/models/{name}/ready": None,
        "POST /v2/models/{name}/infer": {
            "id": "a three",
            "parameters": {"mode": "uncertainty", "samples": 100, "seed": 0},
            "inputs": [{"name": "image", "shape": shape, "datatype": "UINT8", "data": pixels}],
            "outputs": [{"name": name} for name in ("label", "mean", "mutual_information")],
        },
        "POST /v2/repository/index": {"ready": True},
        "POST /v2/repository/models/{name}/unload": {"parameters": {"unload_dependents": False}},
        "POST /v2/repository/models/{name}/load": {"parameters": {}},
        "GET /metrics": None,
    }


def _shortened(text: str) -> str:
    """Leave out of the metrics the buckets of histograms, which are many."""
    return "".join(line for line in text.splitlines(keepends=True) if "_bucket{" not in line)


def main() -> None:
    """Write the examples, one a line."""
    headers = {"Authorization": f"Bearer {os.environ['DROPSERVE_ADMIN_TOKEN']}"}
    url = f"http://127.0.0.1:{os.environ.get('DROPSERVE_PORT', 8000)}"
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in ask(client))
        (ROOT / "service/http/examples.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

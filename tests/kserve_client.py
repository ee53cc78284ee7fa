"""Asks a server with KServe's client, which has an environment of its own: `make test-kserve`.

Prints as JSON what it got. Arguments: URL, model, images (a .npy of [B, H, W], uint8).
"""

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, InferResponse, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def request(model: str, pixels: np.ndarray, *, binary: bool, **more: Any) -> InferRequest:
    """Make a request as the client's documentation does."""
    image = InferInput("image", list(pixels.shape), "UINT8")
    image.set_data_from_numpy(pixels, binary_data=binary)
    return InferRequest(model_name=model, infer_inputs=[image], **more)


def figures(answer: InferResponse) -> dict[str, Any]:
    """Read every output."""
    found = {output.name: output.as_numpy().tolist() for output in answer.outputs}
    return {"model": answer.model_name, **found}


async def ask(url: str, model: str, pixels: np.ndarray) -> dict[str, Any]:
    """Ask whether all is well, in both forms of data, for uncertainty, and for what is wrong."""
    sampling = {"mode": "uncertainty", "samples": 20, "seed": 3, "binary_data_output": True}
    outputs = [RequestedOutput("mean"), RequestedOutput("mutual_information")]
    async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=30)) as client:
        health = [
            await client.is_server_live(url),
            await client.is_server_ready(url),
            await client.is_model_ready(url, model),
            await client.is_model_ready(url, "nothing"),
        ]

        async def infer(**given: Any) -> dict[str, Any]:
            sent = request(model, pixels, **given)
            return figures(await client.infer(url, sent, model_name=model))

        found = {
            "health": health,
            "json": await infer(binary=False),
            "binary": await infer(binary=True),
            "uncertainty": await infer(binary=True, parameters=sampling, request_outputs=outputs),
        }
        try:
            await client.infer(url, request("other", pixels, binary=False), model_name=model)
        except httpx.HTTPStatusError as error:
            found["mismatch"] = str(error)
        return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(sys.argv[1], sys.argv[2], np.load(sys.argv[3])))))

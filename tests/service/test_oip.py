"""Open Inference Protocol v2, over a socket: with Triton's client, and without to send it wrong."""

import asyncio
import base64
import io
import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from dropserve.service.http.protocol import PLAIN, ROWS, SAMPLED

MLP, CNN = "digits-mlp", "colour-cnn"
SHAPES = {MLP: (8, 8), CNN: (16, 16, 3)}
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def pictures(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPES[model]), np.uint8)


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def tensor(values, *, binary):
    kind = {"uint8": "UINT8", "float32": "FP32", "object": "BYTES"}[str(values.dtype)]
    return triton.InferInput("image", list(values.shape), kind).set_data_from_numpy(
        values, binary_data=binary
    )


def encoded(values, *, text):
    data = [base64.b64encode(png(v)) if text else png(v) for v in values]
    return np.array(data, dtype=object)


def native(http, path, values):
    """What the native routes answer for the same pictures, a column a figure."""
    answer = http.post(path, json={"instances": values.tolist()}).raise_for_status().json()
    rows = [{**row, **row.get("interval", {})} for row in answer["predictions"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture(scope="module")
def client(server):
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as found:
        yield found


# Health and metadata


def test_the_server_and_its_models_are_alive_and_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MLP)
    assert client.is_model_ready(MLP, "1")
    assert not client.is_model_ready(MLP, "9")
    assert not client.is_model_ready("nothing")


def test_health_says_so_in_its_body(http):
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}
    assert http.get(f"/v2/models/{MLP}/ready").json() == {"name": MLP, "ready": True}


def test_server_metadata_names_the_extensions(client):
    found = client.get_server_metadata()
    assert found["name"] == "dropserve"
    assert found["extensions"] == ["binary_tensor_data"]  # no admin token: no repository


@pytest.mark.parametrize("version", ["", "1"])
def test_model_metadata_has_every_tensor_as_it_is_answered(version, client):
    found = client.get_model_metadata(MLP, version)
    assert (found["name"], found["versions"], found["platform"]) == (MLP, ["1", "2"], "pytorch")
    assert found["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 1]}]
    described = {t["name"]: (t["datatype"], t["shape"]) for t in found["outputs"]}
    wanted = [triton.InferRequestedOutput(name) for name in described]
    answer = client.infer(MLP, [tensor(pictures(MLP, 3), binary=True)], outputs=wanted)
    for output in answer.get_response()["outputs"]:
        kind, shape = described[output["name"]]
        assert output["datatype"] == kind
        assert output["shape"] == [3 if n == -1 else n for n in shape]
    assert described.keys() == {*PLAIN, *SAMPLED}


# Infer


INPUTS = {
    "UINT8": lambda values, _binary: values,
    "UINT8 with a channel": lambda values, _binary: values.reshape(*values.shape[:3], -1),
    "FP32": lambda values, _binary: values.astype(np.float32),
    "BYTES": lambda values, binary: encoded(values, text=not binary),
    "BYTES in a column": lambda values, binary: encoded(values, text=not binary)[:, np.newaxis],
}


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("model", [MLP, CNN])
@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
@pytest.mark.parametrize("kind", INPUTS)
def test_predictions_are_those_of_predict(kind, binary, model, count, client, http):
    values = pictures(model, count)
    expected = native(http, f"/v1/models/{model}/predict", values)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in PLAIN]
    answer = client.infer(
        model, [tensor(INPUTS[kind](values, binary), binary=binary)], outputs=outputs
    )
    assert answer.get_response()["model_version"] == ("2" if model == MLP else "1")
    np.testing.assert_allclose(answer.as_numpy("probabilities"), expected["probabilities"], **CLOSE)
    assert answer.as_numpy("index").tolist() == expected["index"]
    assert answer.as_numpy("index").dtype == np.int64
    found = answer.as_numpy("label").tolist()
    assert [f.decode() if binary else f for f in found] == expected["label"]


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_uncertainty_is_that_of_the_native_route(binary, http):
    values = pictures(CNN, 3)
    query = "samples=30&seed=7&masks=independent&level=0.5"
    sampled = native(http, f"/v1/models/{CNN}/uncertainty?{query}", values)
    plain = native(http, f"/v1/models/{CNN}/predict", values)
    options = {"samples": 30, "seed": 7, "masks": "independent"}
    body = {
        "parameters": {
            "mode": "uncertainty",
            **options,
            "level": 0.5,
            "binary_data_output": binary,
        },
        "inputs": [{"name": "image", "shape": list(values.shape), "datatype": "UINT8"}],
    }
    body["inputs"][0]["data"] = values.tolist()
    response = http.post(f"/v2/models/{CNN}/infer", json=body)
    length = response.headers.get("inference-header-content-length")
    assert (length is not None) == binary
    answer = triton.InferenceServerClient.parse_response_body(
        response.content, header_length=length and int(length)
    )
    expected = sampled | plain  # index and label are those of eval mode
    assert [o["name"] for o in answer.get_response()["outputs"]] == [*PLAIN, *SAMPLED]
    for name in (*ROWS, *SAMPLED, "index"):
        np.testing.assert_allclose(answer.as_numpy(name), expected[name], **CLOSE, err_msg=name)
    repeated = {"method": "dropout", "log_base": "e", "level": 0.5, **options}
    assert answer.get_response()["parameters"] == repeated


def test_parameters_come_from_the_client_too(client, http):
    values = pictures(MLP, 2)
    expected = native(http, "/uncertainty?samples=20&seed=3", values)
    parameters = {"mode": "uncertainty", "samples": 20, "seed": 3}
    answer = client.infer(MLP, [tensor(values, binary=True)], parameters=parameters)
    assert answer.get_output("probabilities")["parameters"] == {"binary_data_size": 2 * 10 * 4}
    np.testing.assert_allclose(answer.as_numpy("mean"), expected["mean"], **CLOSE)


def test_a_version_can_be_asked_for(client, http):
    values = pictures(MLP, 1)
    expected = native(http, f"/v1/models/{MLP}/versions/1/predict", values)
    answer = client.infer(MLP, [tensor(values, binary=True)], model_version="1", request_id="mine")
    assert answer.get_response()["model_version"] == "1"
    assert answer.get_response()["id"] == "mine"
    np.testing.assert_allclose(answer.as_numpy("probabilities"), expected["probabilities"], **CLOSE)


def test_only_outputs_that_are_asked_for_come_in_their_order_each_as_it_should(client):
    names = ["label", "mutual_information", "index"]
    outputs = [triton.InferRequestedOutput(n, binary_data=n == "label") for n in names]
    answer = client.infer(MLP, [tensor(pictures(MLP, 2), binary=False)], outputs=outputs)
    found = answer.get_response()["outputs"]
    assert [output["name"] for output in found] == names
    assert ["data" in output for output in found] == [False, True, True]
    assert answer.as_numpy("mutual_information").shape == (2,)  # an output can ask for the mode


def test_pictures_of_any_size_are_converted(http, client):
    values = np.random.default_rng(0).integers(0, 256, (2, 120, 90, 3), np.uint8)  # not small
    expected = native(http, "/predict", values)
    for found in (values, encoded(values, text=False)):
        answer = client.infer(MLP, [tensor(found, binary=True)])
        np.testing.assert_allclose(
            answer.as_numpy("probabilities"), expected["probabilities"], **CLOSE
        )


def test_numbers_are_rounded_as_those_of_instances_are(http, client):
    values = np.linspace(0, 255, 64, dtype=np.float32).reshape(1, 8, 8)
    expected = native(http, "/predict", values)
    for binary in (False, True):
        answer = client.infer(MLP, [tensor(values, binary=binary)])
        np.testing.assert_allclose(
            answer.as_numpy("probabilities"), expected["probabilities"], **CLOSE
        )


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_the_asynchronous_client_gets_the_same(binary, client, server):
    values = encoded(pictures(CNN, 3), text=not binary)
    sent = [tensor(values, binary=binary)]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in (*PLAIN, "mean")]

    async def ask():
        async with aio.InferenceServerClient(f"127.0.0.1:{server.port}") as found:
            assert await found.is_server_ready()
            assert await found.is_model_ready(CNN)
            assert (await found.get_model_metadata(CNN))["versions"] == ["1"]
            return await found.infer(CNN, sent, outputs=outputs, parameters={"samples": 20})

    answer = asyncio.run(ask())
    expected = client.infer(CNN, sent, outputs=outputs, parameters={"samples": 20})
    assert answer.get_response() == expected.get_response()
    for name in (*PLAIN, "mean"):
        assert answer.as_numpy(name).tolist() == expected.as_numpy(name).tolist()


IMAGE = {"name": "image", "shape": [1, 2, 2], "datatype": "UINT8", "data": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    "more",
    [
        {"model_name": MLP},  # as KServe's client says
        {"model_name": MLP, "model_version": "2"},
        {"model_name": None, "model_version": None, "id": None},
        {"model_version": ""},
        {"parameters": None, "outputs": None},
        {"outputs": []},
        {"outputs": [{"name": name, "parameters": None} for name in PLAIN]},
        {"inputs": [IMAGE | {"parameters": None}]},
        {"inputs": [IMAGE | {"parameters": {"binary_data_size": None, "content_type": "np"}}]},
        {"parameters": {"mode": None, "scale": 255, "timeout": 0, "content_type": "np"}},
        {"parameters": {"priority": 3, "timeout": 2**63 - 1, "content_type": None}},
        {"parameters": {"sequence_id": 7, "sequence_start": True, "sequence_end": False}},
        {"parameters": {"sequence_id": "seven"}},
        {"parameters": {"scale": None, "timeout": None, "samples": None, "masks": None}},
    ],
    ids=json.dumps,
)
def test_what_other_clients_send_besides_changes_no_answer(more, http):
    path = f"/v2/models/{MLP}/infer"
    plain = http.post(path, json={"inputs": [IMAGE]}).raise_for_status()
    assert http.post(path, json={"inputs": [IMAGE], **more}).content == plain.content


def test_a_version_in_the_path_is_the_one_that_a_body_may_name(http, protocol_error):
    path, body = f"/v2/models/{MLP}/versions/1/infer", {"inputs": [IMAGE], "model_version": "1"}
    assert http.post(path, json=body).status_code == 200
    wrong = protocol_error(http.post(f"/v2/models/{MLP}/infer", json=body), 422)
    assert wrong.startswith("model_version: is not the version that answers")
    wrong = protocol_error(http.post(path, json=body | {"model_name": CNN}), 422)
    assert wrong == "model_name: is not the model of the path: leave it out"


def test_who_would_wait_longer_than_its_timeout_is_told_so(server, protocol_error):
    slow = {"instances": [[[7] * 16] * 16] * 64}
    path = f"/v1/models/{CNN}/uncertainty?samples=1000&seed="
    image = {"inputs": [IMAGE], "outputs": [{"name": "mean"}]}

    async def ask():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            busy = [
                asyncio.create_task(http.post(f"{path}{n}", json=slow)) for n in range(900, 904)
            ]
            await asyncio.sleep(0.2)
            late = image | {"parameters": {"timeout": 200, "seed": 9}}  # 0.2 ms
            answer = await http.post(f"/v2/models/{CNN}/infer", json=late)
            still = sum(not task.done() for task in busy)
            patient = image | {"parameters": {"timeout": 60_000_000, "seed": 9}}
            assert (await http.post(f"/v2/models/{CNN}/infer", json=patient)).status_code == 200
            await asyncio.gather(*busy)
            return answer, still

    answer, still = asyncio.run(ask())
    assert still, "the others were done: ask for more"
    assert "timeout" in protocol_error(answer, 503)
    assert answer.headers["retry-after"] == "1"


def test_what_cannot_be_estimated_is_left_out_unless_it_is_asked_for(http, protocol_error):
    image = {"name": "image", "shape": [1, 1, 1], "datatype": "UINT8", "data": [7]}
    body = {"inputs": [image], "parameters": {"mode": "uncertainty", "samples": 1}}
    path = f"/v2/models/{MLP}/infer"
    found = http.post(path, json=body).raise_for_status().json()
    missing = {"variance", "standard_error", "degrees_of_freedom"}
    assert {o["name"] for o in found["outputs"]} == {*PLAIN, *SAMPLED} - missing
    named = body | {"outputs": [{"name": "variance"}]}
    assert "variance" in protocol_error(http.post(path, json=named), 422)


def test_the_request_is_logged_with_its_route_model_and_number_of_images(http, server):
    image = {"name": "image", "shape": [2, 1, 1], "datatype": "FP32", "data": [7, 8.5]}
    response = http.post(f"/v2/models/{MLP}/versions/1/infer", json={"inputs": [image]})
    line = server.line(response.headers["x-request-id"])
    assert line["route"] == "/v2/models/{name}/versions/{version}/infer"
    assert (line["model"], line["version"], line["images"]) == (MLP, 1, 2)


def test_the_client_reads_the_errors(client):
    picture = pictures(MLP, 1)
    with pytest.raises(InferenceServerException, match="no such model") as caught:
        client.infer("nothing", [tensor(picture, binary=True)])
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match=r"outputs\.0\.name: Input should be"):
        client.infer(
            MLP, [tensor(picture, binary=True)], outputs=[triton.InferRequestedOutput("x")]
        )
    with pytest.raises(InferenceServerException, match="compressed"):
        client.infer(MLP, [tensor(picture, binary=True)], request_compression_algorithm="gzip")


# The page


def test_the_example_of_the_documentation_runs(server, capsys):
    page = (Path(__file__).parents[2] / "docs/api.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "triton" in c]
    assert "127.0.0.1:8000" in code
    exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), {})  # noqa: S102  our own page
    assert len(capsys.readouterr().out.split()) == 2

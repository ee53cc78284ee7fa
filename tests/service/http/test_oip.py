"""Open Inference Protocol v2, over a socket: with Triton's client, and without to send it wrong."""

import asyncio
import base64
import json
import re
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from dropserve.service.app import create_app
from dropserve.service.errors import Overloaded
from dropserve.service.http.routes.oip import PLAIN, ROWS, SAMPLED
from dropserve.service.inference.classifier import Predict, Uncertainty
from dropserve.service.inference.inference import Inference
from dropserve.service.inference.wait_limit import WaitLimit
from dropserve.service.settings import Settings
from tests.helpers import encode, noise

MLP, CNN = "digits-mlp", "colour-cnn"
SHAPES = {MLP: (8, 8), CNN: (16, 16, 3)}
CLOSE = {"atol": 1e-6, "rtol": 1e-5}
TOKEN = "a token of the tests"  # noqa: S105
IMAGE = {"name": "image", "shape": [1, 2, 2], "datatype": "UINT8", "data": [1, 2, 3, 4]}


def images(model, count, seed=0):
    return noise(count, *SHAPES[model], seed=seed)


def tensor(values, *, binary):
    kind = {"uint8": "UINT8", "float32": "FP32", "object": "BYTES"}[str(values.dtype)]
    return triton.InferInput("image", list(values.shape), kind).set_data_from_numpy(
        values, binary_data=binary
    )


def encoded(values, *, text):
    data = [base64.b64encode(encode(v)) if text else encode(v) for v in values]
    return np.array(data, dtype=object)


def native(http, path, values):
    """What the native routes answer for the same images, by name."""
    answer = http.post(path, json={"instances": values.tolist()}).raise_for_status().json()
    rows = [{**row, **row.get("interval", {})} for row in answer["predictions"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture(scope="module")
def client(server):
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as found:
        yield found


# Health and metadata


def test_the_server_and_its_models_are_alive_and_ready(client, http):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MLP)
    assert client.is_model_ready(MLP, "1")
    assert not client.is_model_ready(MLP, "9")
    assert not client.is_model_ready("nothing")
    about = client.get_server_metadata()
    assert (about["name"], about["extensions"]) == ("dropserve", ["binary_tensor_data"])
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}
    assert http.get(f"/v2/models/{MLP}/ready").json() == {"name": MLP, "ready": True}


@pytest.mark.parametrize("version", ["", "1"])
def test_model_metadata_has_every_tensor_as_it_is_answered(version, client):
    found = client.get_model_metadata(MLP, version)
    assert (found["name"], found["versions"], found["platform"]) == (MLP, ["1", "2"], "pytorch")
    assert found["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 1]}]
    described = {t["name"]: (t["datatype"], t["shape"]) for t in found["outputs"]}
    wanted = [triton.InferRequestedOutput(name) for name in described]
    answer = client.infer(MLP, [tensor(images(MLP, 3), binary=True)], outputs=wanted)
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
    values = images(model, count)
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
    values = images(CNN, 3)
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
    data = [output.get("data", ()) for output in answer.get_response()["outputs"]]
    assert not any(isinstance(element, list) for elements in data for element in elements)
    expected = sampled | plain  # index and label are those of eval mode
    assert [o["name"] for o in answer.get_response()["outputs"]] == [*PLAIN, *SAMPLED]
    for name in (*ROWS, *SAMPLED, "index"):
        np.testing.assert_allclose(answer.as_numpy(name), expected[name], **CLOSE, err_msg=name)
    repeated = {"method": "dropout", "log_base": "e", "level": 0.5, **options}
    assert answer.get_response()["parameters"] == repeated


def test_a_version_and_parameters_can_be_asked_for(client, http):
    values = images(MLP, 2)
    expected = native(http, f"/v1/models/{MLP}/versions/1/uncertainty?samples=20&seed=3", values)
    parameters = {"mode": "uncertainty", "samples": 20, "seed": 3}
    sent, named = [tensor(values, binary=True)], {"model_version": "1", "request_id": "mine"}
    answer = client.infer(MLP, sent, parameters=parameters, **named)
    assert answer.get_response()["model_version"] == "1"
    assert answer.get_response()["id"] == "mine"
    assert answer.get_output("probabilities")["parameters"] == {"binary_data_size": 2 * 10 * 4}
    np.testing.assert_allclose(answer.as_numpy("mean"), expected["mean"], **CLOSE)


def test_only_outputs_that_are_asked_for_come_in_their_order_each_as_it_should(http):
    wishes = {"label": None, "mutual_information": False, "index": True}  # one can ask for the mode
    outputs = [{"name": n, "parameters": {"binary_data": wish}} for n, wish in wishes.items()]
    body = {"inputs": [IMAGE], "outputs": outputs, "parameters": {"binary_data_output": True}}
    response = http.post(f"/v2/models/{MLP}/infer", json=body)
    length = int(response.headers["inference-header-content-length"])
    answer = triton.InferenceServerClient.parse_response_body(
        response.content, header_length=length
    )
    found = answer.get_response()["outputs"]
    assert [output["name"] for output in found] == list(wishes)
    assert ["data" in output for output in found] == [False, True, False]
    assert [answer.as_numpy(name).shape for name in wishes] == [(1,)] * 3


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_images_of_any_size_are_converted_and_numbers_rounded(binary, http, client):
    large = noise(2, 120, 90, 3)  # not small
    numbers = np.linspace(0, 255, 64, dtype=np.float32).reshape(1, 8, 8)
    for values, sent in (
        (large, large),
        (large, encoded(large, text=not binary)),
        (numbers, numbers),
    ):
        expected = native(http, "/predict", values)["probabilities"]
        answer = client.infer(MLP, [tensor(sent, binary=binary)])
        np.testing.assert_allclose(answer.as_numpy("probabilities"), expected, **CLOSE)


@pytest.mark.parametrize(
    "more",
    [
        {"model_name": MLP},  # as KServe's client says
        {"model_name": MLP, "model_version": "2"},
        {"model_name": None, "model_version": None, "id": None},
        {"model_name": "", "model_version": ""},
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
    assert list(plain.json()) == ["model_name", "model_version", "outputs"]


def test_a_version_in_the_path_is_the_one_that_a_body_may_name(http, protocol_error):
    path, body = f"/v2/models/{MLP}/versions/1/infer", {"inputs": [IMAGE], "model_version": "1"}
    assert http.post(path, json=body).status_code == 200
    wrong = protocol_error(http.post(f"/v2/models/{MLP}/infer", json=body), 422)
    assert wrong.startswith("model_version: is not the version that answers")
    wrong = protocol_error(http.post(path, json=body | {"model_name": CNN}), 422)
    assert wrong == "model_name: is not the model of the path: leave it out"


def test_what_cannot_be_estimated_is_left_out_unless_named(http, protocol_error):
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


# In this process


class RecordingInference(Inference):
    """Remembers tasks, the pixels they get and how long they wait; counts decoding on threads."""

    async def run(self, model, task, pixels, images, limit=None):
        left = limit.left
        answer = await super().run(model, task, pixels, images, limit)
        self.ran.append((task, pixels() if callable(pixels) else pixels, images, left))
        return answer

    async def decode(self, steps, limit):
        self.decoded += 1
        return await super().decode(steps, limit)


@pytest.fixture
def inference(checkpoints):
    settings = Settings(checkpoints=checkpoints, max_samples=20, admin_token=TOKEN)
    running = RecordingInference(settings)
    running.ran, running.decoded = [], 0
    yield running
    running.close()


@pytest.fixture
def post(inference):
    """Posts to a service that draws 20 samples at most; no body is held afterwards."""
    app = create_app(inference._settings, inference)
    app.state.inference = inference
    transport = httpx.ASGITransport(app)

    async def send(path, sent):
        async with httpx.AsyncClient(transport=transport, base_url="http://x/v2/") as client:
            return await client.post(path, **sent)

    yield lambda path, **sent: asyncio.run(send(path, sent))
    assert app.state.reader._held == 0


@pytest.mark.parametrize(
    ("data", "decoded"),
    [
        (images(MLP, 1), 0),
        (np.zeros((2, 50, 100), np.uint8), 2),
        ([encode(images(MLP, 1)[0])], 0),
        ([encode(images(MLP, 1)[0])] * 2, 0),
        ([encode(images(MLP, 1)[0], "JPEG")], 0),
        ([encode(noise(130, 130))], 2),
        ([encode(images(MLP, 1)[0], icc_profile=bytes(2000))], 1),
        ([encode(images(MLP, 1)[0], "JPEG", comment=bytes(1000))], 1),
    ],
    ids=[
        "pixels",
        "many pixels",
        "a small PNG",
        "two",
        "a JPEG",
        "a large PNG",
        "a profile",
        "a comment",
    ],
)
def test_prediction_and_sampling_share_the_pixels(data, decoded, post, inference):
    image = {"name": "image", "shape": [len(data)], "datatype": "BYTES"}
    if isinstance(data, list):
        image["data"] = [base64.b64encode(content).decode() for content in data]
    else:
        image |= {"shape": data.shape, "datatype": "UINT8", "data": data.tolist()}
    body = {"inputs": [image], "parameters": {"mode": "uncertainty", "timeout": 1_500_000}}
    assert post(f"models/{MLP}/infer", json=body).status_code == 200
    (plain, pixels, count, wait), (sampled, same, _, _) = inference.ran
    assert (plain, sampled) == (Predict(), Uncertainty(samples=20))
    assert pixels is same
    assert pixels.shape == (len(data), 1, 8, 8)
    assert (inference.decoded, count) == (decoded, len(data))
    assert 0.5 < wait <= 1.5


@pytest.mark.parametrize(("samples", "drawn"), [(None, 20), (20, 20), (19, 19), (21, None)])
def test_no_more_samples_are_drawn_than_allowed(samples, drawn, post, inference):
    body = {"inputs": [IMAGE], "outputs": [{"name": "mean"}], "parameters": {"samples": samples}}
    response = post(f"models/{MLP}/infer", json=body)
    if drawn is None:
        assert (response.status_code, inference.ran) == (422, [])
        assert response.json() == {"error": "samples: at most 20 here"}
    else:
        assert response.json()["parameters"]["samples"] == drawn
        assert [task for task, *_ in inference.ran] == [Uncertainty(samples=drawn)]


def test_only_what_the_outputs_need_runs(post, inference):
    body = {
        "inputs": [IMAGE],
        "outputs": [{"name": "label"}],
        "parameters": {"mode": "uncertainty"},
    }
    assert "parameters" not in post(f"models/{MLP}/infer", json=body).json()
    assert [task for task, *_ in inference.ran] == [Predict()]


def test_a_request_that_waits_longer_than_its_timeout_is_refused(inference):
    model = inference.store.find(MLP)
    model.inline = {}  # or nothing would wait

    def slow():
        time.sleep(0.3)
        return np.zeros((1, 1, 8, 8), np.uint8)

    async def ask():
        busy = asyncio.create_task(inference.run(model, Predict(), slow, 1, WaitLimit(2)))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="waited for longer than it may"):
            await inference.run(model, Uncertainty(samples=20), slow, 1, WaitLimit(0.1))
        await busy

    asyncio.run(ask())


def test_the_repository_reads_its_token_and_its_bodies(post):
    for scheme, body, status in (("bearer ", {}, 200), ("BEARER", {"ready": 1}, 422)):
        headers = {"Authorization": f"{scheme} {TOKEN}"}
        assert post("repository/index", headers=headers, json=body).status_code == status


# The page


def test_the_example_of_the_documentation_runs(server, capsys):
    page = (Path(__file__).parents[3] / "docs/api.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "triton" in c]
    assert "127.0.0.1:8000" in code
    exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), {})  # noqa: S102  our own page
    assert len(capsys.readouterr().out.split()) == 2

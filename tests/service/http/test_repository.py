"""The model repository of the Open Inference Protocol: who may use it, and what it does."""

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

MLP, CNN = "digits-mlp", "colour-cnn"
TOKEN = "a token of the tests"  # noqa: S105


def test_the_repository_is_closed_without_a_token(http, protocol_error):
    for path in ("index", f"models/{MLP}/load", f"models/{MLP}/unload"):
        assert "DROPSERVE_ADMIN_TOKEN" in protocol_error(http.post(f"/v2/repository/{path}"), 403)
    assert http.get(f"/v2/models/{MLP}/ready").status_code == 200


@pytest.fixture(scope="module")
def admin(make_server):
    """A server with a repository that is open to who has the token."""
    return make_server(admin_token=TOKEN).start()


@pytest.mark.parametrize(
    "given",
    [None, "Bearer", "Bearer MARKER", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer é"],
)
def test_a_wrong_token_is_refused(given, admin, protocol_error):
    headers = {} if given is None else {"Authorization": given.encode()}
    for path in ("index", f"models/{MLP}/unload"):
        response = httpx.post(f"{admin.url}/v2/repository/{path}", headers=headers)
        protocol_error(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{admin.url}/v2/models/{MLP}/ready").status_code == 200


def test_models_are_listed_unloaded_and_loaded(admin):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    image = triton.InferInput("image", [1, 1, 1], "UINT8")
    image.set_data_from_numpy(np.zeros((1, 1, 1), np.uint8))
    with triton.InferenceServerClient(f"127.0.0.1:{admin.port}") as client:
        assert "model_repository" in client.get_server_metadata()["extensions"]

        def states():
            index = client.get_model_repository_index(headers=headers)
            return {(m["name"], m["version"]): m["state"] for m in index}

        served = {(CNN, "1"): "READY", (MLP, "1"): "READY", (MLP, "2"): "READY"}
        assert states() == served
        client.unload_model(CNN, headers=headers)
        assert not client.is_model_ready(CNN)
        assert states() == served | {(CNN, "1"): "UNAVAILABLE"}
        only = httpx.post(
            f"{admin.url}/v2/repository/index", json={"ready": True}, headers=headers
        ).json()
        assert {m["name"] for m in only} == {MLP}
        with pytest.raises(InferenceServerException, match="no such model"):
            client.infer(CNN, [image])
        with pytest.raises(InferenceServerException, match="no such model"):
            client.unload_model(CNN, headers=headers)
        client.unload_model(MLP, headers=headers)
        assert not client.is_server_ready()
        for name in (MLP, CNN):
            client.load_model(name, headers=headers)
        assert client.is_model_ready(CNN)
        assert states() == served
        answer = client.infer(CNN, [image])
        assert answer.as_numpy("probabilities").shape == (1, 4)
        with pytest.raises(InferenceServerException, match="no such model"):
            client.load_model("nothing", headers=headers)
        with pytest.raises(InferenceServerException, match="parameters"):
            client.load_model(CNN, headers=headers, config="{}")


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("index", 400, b"MARKER"),
        ("index", 422, b"[]"),
        ("index", 422, b'{"ready": 1}'),
        ("index", 422, b'{"MARKER1": 1}'),
        (f"models/{MLP}/load", 422, b'{"MARKER1": 1}'),
        (f"models/{MLP}/unload", 422, b'{"parameters": {"unload_dependents": 5}}'),
        (f"models/{MLP}/unload", 422, b'{"parameters": {"MARKER1": true}}'),
        ("models/..%2fMARKER/load", 404, b""),
        ("models/MARKER/load", 404, b"{}"),
    ],
)
def test_bodies_of_the_repository_are_read_strictly(path, status, body, admin, protocol_error):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    protocol_error(
        httpx.post(f"{admin.url}/v2/repository/{path}", content=body, headers=headers), status
    )
    assert httpx.get(f"{admin.url}/v2/models/{MLP}/ready").status_code == 200

"""KServe's own client against a server; its protobuf is not ours, so it runs in its environment."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-kserve/bin/python"
MLP = "digits-mlp"
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.mark.skipif(not PYTHON.exists(), reason="`make test-kserve` makes its environment")
def test_kserves_client_gets_what_the_native_routes_answer(server, http, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    script = ROOT / "tests/kserve_client.py"
    command = [PYTHON, script, server.url, MLP, tmp_path / "pixels.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["health"] == [True, True, True, False]
    body = {"instances": pixels.tolist()}
    plain = http.post("/predict", json=body).json()["predictions"]
    for kind in ("json", "binary"):
        assert found[kind]["model"] == MLP
        probabilities = [prediction["probabilities"] for prediction in plain]
        np.testing.assert_allclose(found[kind]["probabilities"], probabilities, **CLOSE)
        assert found[kind]["index"] == [prediction["index"] for prediction in plain]
    sampled = http.post("/uncertainty?samples=20&seed=3", json=body).json()["predictions"]
    for name in ("mean", "mutual_information"):
        expected = [prediction[name] for prediction in sampled]
        np.testing.assert_allclose(found["uncertainty"][name], expected, **CLOSE)
    assert "model_name: is not the model of the path" in found["mismatch"]
    assert "422" in found["mismatch"]

"""`/compare?p=`: the same weights at another rate of dropout."""

import numpy as np
import pytest
import torch
from torch import nn

from dropserve.models import checkpoint
from dropserve.models.montecarlo import Sampler
from dropserve.models.montecarlo.masks import draw
from dropserve.service.schemas import CompareResponse

PATH = "/v1/models/digits-mlp/versions/1/compare?passes=4&seed=3"
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)


def compared(http, query=""):
    response = http.post(PATH + query, json={"instances": [PICTURE.tolist()]})
    assert response.status_code == 200, response.text
    return CompareResponse.model_validate_json(response.content, strict=True), response.json()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_every_site_drops_at_that_rate_and_scales_what_it_keeps(p, http, checkpoints):
    found, raw = compared(http, f"&p={p}")
    assert (found.p, raw["p"], raw["passes"], raw["seed"]) == (p, p, 4, 3)
    assert {layer.p for layer in found.layers if layer.name.startswith("dropout")} == {p}
    module, _ = checkpoint.load(checkpoints / "digits-mlp" / "1")
    weights = {name: t.double().numpy() for name, t in module.state_dict().items()}
    for t, train in enumerate(found.predictions[0].train):
        h = ((255 - PICTURE.reshape(-1)) / 255 - 0.3) / 0.4
        for site in (0, 1):
            h = weights[f"hidden{site + 1}.weight"] @ h + weights[f"hidden{site + 1}.bias"]
            kept = draw("independent", 3, site, 32, p, range(t, t + 1))[0]
            h = np.maximum(h, 0) * kept / (1 - p)
        logits = weights["logits.weight"] @ h + weights["logits.bias"]
        expected = np.exp(logits - logits.max())
        np.testing.assert_allclose(train, expected / expected.sum(), atol=1e-5)


def test_eval_mode_is_what_it_was_whatever_the_rate(http):
    plain, raw = compared(http)
    assert plain.p is None
    assert "p" not in raw
    assert [layer.p for layer in plain.layers if layer.p is not None] == [0.2, 0.5]
    for p in (0, 0.5):
        found, _ = compared(http, f"&p={p}")
        assert found.predictions[0].eval == plain.predictions[0].eval
        assert [layer.eval for layer in found.layers] == [layer.eval for layer in plain.layers]


def test_at_rate_zero_train_mode_is_eval_mode(http):
    (found,) = compared(http, "&p=0")[0].predictions
    np.testing.assert_allclose(found.train, [found.eval[0]] * 4, atol=1e-6)
    assert found.distance == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("p", ["1", "-0.1", "nan", "", "null", "1e400", "MARKER"])
def test_what_is_no_rate_is_refused(p, http, problem):
    response = http.post(f"{PATH}&p={p}", json={"instances": [PICTURE.tolist()]})
    assert problem(response, 422).startswith("p: ")


@pytest.mark.parametrize("p", ["0.9999999999999999", "1e-320"])
def test_the_ends_of_the_range_are_no_failure(p, http):
    assert http.post(f"{PATH}&p={p}", json={"instances": [PICTURE.tolist()]}).status_code == 200


def test_alpha_dropout_keeps_the_rate_that_its_values_belong_to():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 40), nn.AlphaDropout(0.25), nn.Linear(40, 3)).eval()
        x = torch.randn(2, 6)
    sampler = Sampler(module, x)
    expected = sampler.thinned(x, 0, "independent", 0)
    assert torch.equal(sampler.thinned(x, 0, "independent", 0, p=0.75), expected)
    assert sampler.sites[0].p == 0.25

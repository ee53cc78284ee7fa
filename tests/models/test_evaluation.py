"""Scores against NumPy by hand."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dropserve.models.data import Split
from dropserve.models.dropout import InvertedDropout
from dropserve.models.evaluation import evaluate, score
from dropserve.models.montecarlo import Sampler


def by_hand(p, labels, bins=15):
    """Accuracy, NLL, Brier score and ECE (Guo et al., 2017, equation 3), one image at a time."""
    hits, nll, brier = [], 0.0, 0.0
    for row, label in zip(p, labels, strict=True):
        hits.append(int(np.argmax(row)) == label)
        nll -= np.log(row[label]) / len(p)
        brier += sum((q - (c == label)) ** 2 for c, q in enumerate(row)) / len(p)
    confidence, hits = p.max(1), np.array(hits)
    ece = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            ece += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    return {"accuracy": hits.mean(), "nll": nll, "brier": brier, "ece": ece}


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 200), st.floats(0.1, 5))
def test_scores_equal_numpy_by_hand(seed, classes, images, sharpness):
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.normal(size=(images, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = generator.integers(classes, size=images)
    got = score(torch.from_numpy(p), torch.from_numpy(labels))
    for name, value in by_hand(p, labels).items():
        assert got[name] == pytest.approx(value, abs=2e-6), name


def test_a_perfect_and_a_hopeless_answer_get_the_extreme_scores():
    p, labels = torch.eye(3), torch.arange(3)
    perfect, hopeless = score(p, labels), score(p, (labels + 1) % 3)
    assert perfect == pytest.approx({"accuracy": 1, "nll": 0, "brier": 0, "ece": 0})
    nll = -np.log(np.finfo(np.float32).tiny)  # finite, all the same
    assert hopeless == pytest.approx({"accuracy": 0, "nll": nll, "brier": 2, "ece": 1})


def data(images=700):
    pixels = torch.randint(256, (images, 1, 2, 2), dtype=torch.uint8)
    return Split(pixels, torch.randint(3, (images,)))


def normalize(pixels):
    return pixels.float() / 255


def test_evaluate_scores_the_eval_mode_and_the_mean_of_thinned_networks():
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), InvertedDropout(0.5), nn.Linear(8, 3))
    images, seen = data(), []
    got = evaluate(module.train(), images, normalize, 20, 7, lambda *done: seen.append(done))
    x = normalize(images.images)
    assert not module.training
    with torch.no_grad():
        plain = module(x).softmax(-1).double().numpy()
    mean = Sampler(module, x[:1]).sample(x, 20, 7).double().mean(0).numpy()
    assert got["images"] == 700
    assert got["eval"] == pytest.approx(by_hand(plain, images.labels.numpy()), abs=2e-6)
    expected = {**by_hand(mean, images.labels.numpy()), "samples": 20, "seed": 7}
    assert got["dropout"] == pytest.approx(expected, abs=2e-6)
    assert seen == [(500, 700), (700, 700)]
    assert json.loads(json.dumps(got)) == got


@pytest.mark.parametrize(("p", "samples"), [(0.5, 0), (0.0, 100)])
def test_without_samples_or_without_dropout_eval_mode_alone_is_scored(p, samples):
    layers = [nn.Flatten(), nn.Linear(4, 3), *([InvertedDropout(p)] if p else [])]
    got = evaluate(nn.Sequential(*layers), data(50), normalize, samples)
    assert set(got) == {"images", "eval"}


def test_confusion_counts_a_row_a_label_and_a_column_an_answer():
    module, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), data()
    got = evaluate(module, images, normalize, samples=0, confusion=True)["confusion"]
    answers = module(normalize(images.images)).argmax(1)
    pairs = list(zip(images.labels.tolist(), answers.tolist(), strict=True))
    assert got == [[pairs.count((label, answer)) for answer in range(3)] for label in range(3)]

"""Training: it learns, it repeats itself to the bit, and it stops when told."""

import itertools
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dropserve.models.data import Split
from dropserve.models.dropout import InvertedDropout
from dropserve.models.errors import ConfigError, TrainingDiverged
from dropserve.models.hyperparameters import Recipe
from dropserve.models.networks import NetworkConfig, default_config
from dropserve.models.preprocessing import Preprocessing
from dropserve.models.processes import launch
from dropserve.models.training import cpu_threads, fit, validate, with_threads

MLP = NetworkConfig("mlp", (1, 8, 8), 10, (32,), (0.3,))
CNN = NetworkConfig("cnn", (1, 8, 8), 10, (16,), (0.3,), (4, 6), 0.2)
SHORT = Recipe(epochs=6, batch_size=64, shift=1, flip=True, label_smoothing=0.1)
SMALL = 320
"""Images in a run whose outcome does not matter."""


def build(config, seed=0):
    torch.manual_seed(seed)
    return config.build()


def start(module, digits, recipe, images=SMALL, **options):
    data = digits.train.take(torch.arange(images))
    normalize = digits.preprocessing.normalize
    return fit(module, data, normalize, recipe, fabric=launch("cpu"), **options)


def copy(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_mlp_learns_the_digits(digits):
    module = NetworkConfig("mlp", (1, 8, 8), 10).build()
    epochs = list(start(module, digits, Recipe(epochs=10), images=1437))
    assert [e.number for e in epochs] == list(range(1, 11))
    losses = [e.loss for e in epochs]
    assert losses[-1] < 0.2 * losses[0]
    assert epochs[-1].train_accuracy > epochs[0].train_accuracy
    assert not module.training
    assert validate(module, digits.test, digits.preprocessing.normalize)[0] >= 0.95


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("config", [MLP, CNN], ids=["mlp", "cnn with batch norm"])
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(digits, tmp_path, config, optimizer):
    recipe = replace(SHORT, optimizer=optimizer, learning_rate=0.01)
    unbroken = build(config)
    expected = [(e.loss, e.validation_accuracy) for e in start(unbroken, digits, recipe)]

    path = tmp_path / "run" / "state.safetensors"
    run = start(build(config), digits, recipe, state_path=path)
    first = [(e.loss, e.validation_accuracy) for e in islice(run, 3)]
    run.close()
    torch.manual_seed(99)  # what was drawn meanwhile must not matter
    resumed = build(config, seed=5)
    rest = start(resumed, digits, recipe, state_path=path)
    assert first + [(e.loss, e.validation_accuracy) for e in rest] == expected
    assert equal(copy(resumed), copy(unbroken))


def test_a_finished_run_resumes_to_its_best_weights_at_once(digits, tmp_path):
    done, again = build(MLP), build(MLP, seed=5)
    list(start(done, digits, SHORT, state_path=tmp_path / "state"))
    assert list(start(again, digits, SHORT, state_path=tmp_path / "state")) == []
    assert equal(copy(again), copy(done))
    assert not again.training


class Unused(nn.Module):
    """Has a parameter that no answer depends on, so it never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3, 2))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x)


def test_a_module_with_an_unused_parameter_resumes_too(digits, tmp_path):
    run = start(Unused(), digits, SHORT, state_path=tmp_path / "state")
    assert len(list(islice(run, 2))) == 2
    run.close()
    rest = list(start(Unused(), digits, SHORT, state_path=tmp_path / "state"))
    assert [e.number for e in rest] == [3, 4, 5, 6]


def test_a_seed_decides_a_run(digits):
    runs = []
    for seed in (3, 3, 4):
        module = build(CNN)
        list(start(module, digits, replace(SHORT, epochs=2, seed=seed)))
        runs.append(copy(module))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_a_run_leaves_the_global_generator_alone(digits):
    torch.manual_seed(1)
    expected = torch.rand(3)
    module = build(MLP)
    torch.manual_seed(1)
    list(start(module, digits, replace(SHORT, epochs=1)))
    assert torch.equal(torch.rand(3), expected)


class Idle(nn.Module):
    """Has parameters that get a gradient of exactly zero: only weight decay can move them."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))
        self.kernel = nn.Parameter(torch.ones(2, 1, 3, 3))
        self.bias = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(4)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        idle = sum(p.sum() for p in (self.matrix, self.kernel, self.bias, *self.norm.parameters()))
        return self.net(x) + 0 * idle


def test_weight_decay_shrinks_matrices_and_kernels_and_no_biases_and_norms(digits):
    recipe = Recipe(epochs=2, batch_size=32, learning_rate=0.01, weight_decay=0.5)
    module = Idle()
    states = [copy(module) for _ in start(module, digits, recipe, images=100)]
    # 90 images train: two steps an epoch. AdamW multiplies by 1 - rate x decay at each; the rate
    # is warmed up over the first 5% of the four steps, then falls along half a cosine.
    first = 1e-3 / (0.05 + 1e-3)
    cosine = [
        (1 + torch.cos(torch.tensor(torch.pi * (s - 0.05) / 0.95))) / 2 for s in (0.25, 0.5, 0.75)
    ]
    expected = 1.0
    for rate in (first, *cosine):
        expected *= 1 - 0.01 * float(rate) * 0.5
    last = states[-1]
    for name in ("matrix", "kernel"):
        torch.testing.assert_close(last[name], torch.full_like(last[name], expected))
    for name in ("bias", "norm.weight", "norm.bias"):
        start_value = torch.zeros_like(last[name]) if name == "norm.bias" else torch.ones(())
        assert torch.equal(last[name], start_value.expand_as(last[name]))


def test_a_run_stops_after_patience_epochs_without_progress_and_a_resume_counts_on(
    digits, tmp_path
):
    recipe = replace(SHORT, epochs=50, patience=3, learning_rate=1e-12)
    run = start(build(MLP), digits, recipe, state_path=tmp_path / "state")
    epochs = list(islice(run, 2))
    run.close()
    epochs += start(build(MLP), digits, recipe, state_path=tmp_path / "state")
    assert [e.number for e in epochs] == [1, 2, 3, 4]
    assert [e.best for e in epochs] == [True, False, False, False]


def test_the_best_weights_are_kept_and_not_the_last(digits):
    recipe = replace(SHORT, epochs=9, optimizer="sgd", learning_rate=0.5)
    module = build(MLP)
    history = [(e.validation_accuracy, e.best, copy(module)) for e in start(module, digits, recipe)]
    scores = [score for score, _, _ in history]
    best = max(epoch for epoch, (_, is_best, _) in enumerate(history) if is_best)
    assert scores[best] == max(scores)
    assert best < len(history) - 1, "this test needs a run that gets worse"
    assert equal(copy(module), history[best][2])
    assert not equal(copy(module), history[-1][2])
    assert [b for _, b, _ in history] == [
        s > max(scores[:i], default=-1) for i, s in enumerate(scores)
    ]


class Process(Fabric):
    """One of several processes, without the others."""

    def __init__(self, rank=0, world_size=1):
        super().__init__(accelerator="cpu", devices=1)
        self.place = rank, world_size

    global_rank = property(lambda self: self.place[0])
    world_size = property(lambda self: self.place[1])


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_share_the_images_of_an_epoch_and_hold_the_same_ones_out(processes):
    data = Split(torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1), torch.arange(100) % 2)
    trained, validated = [], []

    def normalize(pixels):
        (trained if module.training else validated).append(pixels.flatten().tolist())
        return pixels.float()

    for rank in range(processes):
        module = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        recipe = Recipe(epochs=2, batch_size=30)
        list(fit(module, data, normalize, recipe, fabric=Process(rank, processes)))
    assert {len(share) for share in trained} == {30 // processes}
    assert len(trained) == 2 * 3 * processes
    assert len({tuple(held_out) for held_out in validated}) == 1
    assert not set(validated[0]) & {image for share in trained for image in share}
    for epoch in (0, 1):  # each image once
        of_epoch = [share for i, share in enumerate(trained) if i // 3 % 2 == epoch]
        assert sorted(itertools.chain(*of_epoch, validated[0])) == list(range(100))


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(digits):
    run = fit(build(MLP), digits.train, digits.preprocessing.normalize, SHORT, fabric=Process(0, 3))
    with pytest.raises(ConfigError, match="batch_size must be a multiple of 3, the processes"):
        next(run)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_batch_in_parts_trains_as_a_whole_one_does(digits, optimizer):
    """Without noise: gradients of four parts of 16 images are those of a batch of 64."""
    config, weights, scores = replace(MLP, dropout=(0.0,)), [], []
    recipe = replace(SHORT, epochs=5, learning_rate=0.01, optimizer=optimizer, l1=1e-4)
    for accumulate in (1, 4):
        module = build(config)
        for epoch in start(module, digits, recipe, accumulate=accumulate):  # four steps each
            last = copy(module), (epoch.loss, epoch.train_accuracy)
        weights.append(last[0])
        scores.append(last[1])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-5)
        assert not torch.equal(expected, build(config).state_dict()[name])
    with pytest.raises(ConfigError, match="multiple of 1, the processes, times 3, the parts"):
        next(start(module, digits, recipe, accumulate=3))


def test_a_run_goes_on_with_other_parts(digits, tmp_path):
    run = start(build(MLP), digits, SHORT, state_path=tmp_path / "state")
    next(run)
    run.close()
    rest = start(build(MLP), digits, SHORT, state_path=tmp_path / "state", accumulate=2)
    assert [epoch.number for epoch in rest] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_follows_its_schedule(digits, schedule):
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    recipe = replace(SHORT, epochs=10, learning_rate=0.02, schedule=schedule)
    list(start(build(MLP), digits, recipe))
    hook.remove()
    assert len(rates) == 40  # four steps an epoch
    if schedule == "constant":
        assert {*rates} == {0.02}
        return
    assert max(rates) == rates[2] == 0.02  # a twentieth of the steps
    assert rates[0] < rates[1] < rates[2]
    half = [0.01 * (1 + math.cos(math.pi * k / 38)) for k in range(38)]
    assert rates[2:] == pytest.approx(half)


def test_progress_counts_the_images_of_an_epoch(digits):
    seen = []
    recipe = replace(SHORT, epochs=1)
    list(start(build(MLP), digits, recipe, progress=lambda *done: seen.append(done)))
    assert seen == [(64, 256), (128, 256), (192, 256), (256, 256)]


def test_validation_is_in_eval_mode():
    module = nn.Sequential(nn.Flatten(), InvertedDropout(0.9))
    labels = torch.arange(10).repeat(120)
    images = torch.nn.functional.one_hot((labels + (labels == 9)) % 10, 10)
    data = Split(images.byte().view(1200, 1, 1, 10), labels)
    normalize = Preprocessing((1, 10), 1, (0.0,), (1.0,)).normalize
    accuracy, loss = validate(module.train(), data, normalize)
    assert accuracy == 0.9
    white = math.exp(1 / 255)  # of ten logits one is 1/255, of nine images in ten the label's
    assert loss == pytest.approx(math.log(9 + white) - 0.9 / 255, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0}, {"batch_size": 1}, {"patience": -1}, {"shift": -1}, {"learning_rate": 0.0},
        {"learning_rate": float("nan")}, {"weight_decay": -1.0}, {"label_smoothing": 1.0},
        {"validation_share": 0.0}, {"validation_share": 1.0}, {"optimizer": "adam"}, {"seed": -1},
        {"seed": 2**63}, {"weight_decay": float("nan")}, {"threads": 0}, {"schedule": "linear"},
    ],
    ids=repr,
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError):
        Recipe(**change)


def test_too_few_images_are_refused(digits):
    with pytest.raises(ConfigError, match="2 images are too few"):
        next(start(build(MLP), digits, SHORT, images=2))


def test_a_run_that_diverges_stops_and_keeps_the_state_before(digits, tmp_path):
    state = tmp_path / "state.safetensors"
    module = MLP.build()
    with torch.no_grad():
        module.logits.weight.fill_(1e38)
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        list(start(module, digits, Recipe(epochs=3, batch_size=64), state_path=state))
    assert not state.exists()


@pytest.mark.parametrize(
    ("shape", "batch", "threads"),
    [((1, 8, 8), 32, 1), ((1, 28, 28), 128, 1), ((3, 64, 64), 128, 3)],
)
def test_small_networks_get_one_thread_and_large_ones_what_there_is(shape, batch, threads):
    config = default_config("mlp" if batch == 32 or shape[0] == 1 else "cnn", shape, 10)
    module, example = config.build(), torch.zeros(1, *shape)
    with cpu_threads(3):
        chosen = with_threads(Recipe(batch_size=batch), module, example)
        given = with_threads(Recipe(batch_size=batch, threads=2), module, example)
    assert (chosen.threads, given.threads) == (threads, 2)


def test_a_run_computes_with_its_threads_and_leaves_the_process_its_own(digits):
    seen = set()

    def normalize(pixels):
        seen.add(torch.get_num_threads())
        return digits.preprocessing.normalize(pixels)

    before = torch.get_num_threads()
    data = digits.train.take(torch.arange(SMALL))
    run = fit(
        build(MLP), data, normalize, replace(SHORT, epochs=2, threads=3), fabric=launch("cpu")
    )
    for _ in run:
        assert torch.get_num_threads() == before
    assert seen == {3}

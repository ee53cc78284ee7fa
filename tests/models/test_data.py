"""Datasets and their augmentation; damaged files are refused; nothing here uses a network."""

import gzip
import hashlib
import http.client
import io
import os
import threading
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from time import sleep
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dropserve.models.data import Split, augment, download, load_dataset, read_idx
from dropserve.models.errors import DataError
from dropserve.models.evaluation import evaluate
from dropserve.models.examples import choose
from dropserve.models.hyperparameters import Recipe
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.models.processes import launch
from dropserve.models.training import fit

DATA_DIR = Path(
    os.environ.get("DROPSERVE_DATA_DIR") or Path(__file__).parents[2].parent / "shared" / "data"
)
needs_fashion = pytest.mark.skipif(
    not (DATA_DIR / "fashion-mnist").is_dir(),
    reason="Fashion-MNIST is not here: set DROPSERVE_DATA_DIR to the folder that has it",
)


def idx(array):
    """Write an IDX file as its specification says: 0, 0, type 8, rank, sizes, bytes."""
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


ARRAY = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
GOOD = idx(ARRAY)
GZIPPED = gzip.compress(GOOD)


def test_digits_are_split_once_and_for_all(digits):
    assert digits.train.images.shape == (1437, 1, 8, 8)
    assert digits.test.images.shape == (360, 1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert digits.digest() == ("3616d13d9b8a0a7a70107bddfd1b1572ec4785e7884f0571b848e039b01e1a3f")


def test_digits_are_scikit_learns_in_256_greys_without_loss(digits):
    def rows(images, labels):
        return sorted((*image, label) for image, label in zip(images, labels, strict=True))

    raw = load_digits()
    images = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    labels = torch.cat([digits.train.labels, digits.test.labels])
    sixteenths = np.rint(images.numpy() * (16 / 255)).astype(int)
    assert rows(sixteenths.tolist(), labels.tolist()) == rows(
        raw.data.astype(int).tolist(), raw.target.tolist()
    )
    shares = torch.bincount(digits.test.labels).double() / torch.bincount(labels)
    assert (shares - 0.2).abs().max() < 0.005  # stratified


def test_digest_sees_any_pixel_and_any_label(digits):
    image, label = digits.test.images.clone(), digits.test.labels.clone()
    image[7, 0, 3, 3] ^= 1
    label[7] = (label[7] + 1) % 10
    changed = (Split(image, digits.test.labels), Split(digits.test.images, label))
    digests = {replace(digits, test=test).digest() for test in (digits.test, *changed)}
    assert len(digests) == 3


def test_a_dataset_is_described_by_its_name_digest_and_sizes(digits):
    expected = {"name": "digits", "digest": digits.digest(), "train": 1437, "test": 360}
    assert digits.origin() == expected
    summary = "digits: 1,437 images to train on, 360 to test on; 10 classes; 8x8 pixels"
    assert digits.summary() == summary
    assert digits.train.digest() != digits.test.digest()


def test_options_of_a_named_dataset_go_into_the_preprocessing_and_it_has_its_own_size(tmp_path):
    with pytest.raises(DataError, match="no dataset 'imagenet': give digits, fashion-mnist, mnist"):
        load_dataset("imagenet", tmp_path)
    with pytest.raises(DataError, match="digits has a size of its own"):
        load_dataset("digits", tmp_path, size=(16, 16))
    found = load_dataset("digits", tmp_path, invert=True, fit="pad").preprocessing
    assert (found.invert, found.fit, found.draft) == (True, "pad", False)


@pytest.mark.parametrize("raw", [GOOD, GZIPPED], ids=["plain", "gzipped"])
def test_an_idx_file_is_read(tmp_path, raw):
    (tmp_path / "file").write_bytes(raw)
    assert torch.equal(read_idx(tmp_path / "file"), torch.from_numpy(ARRAY))


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:-1], id="cut short"),
        pytest.param(GOOD[:9], id="cut in the sizes"),
        pytest.param(GOOD + b"\0", id="a byte too many"),
        pytest.param(b"\x01" + GOOD[1:], id="wrong magic"),
        pytest.param(GOOD[:2] + b"\x0d" + GOOD[3:], id="floats"),
        pytest.param(GOOD[:3] + b"\0" + GOOD[4:], id="rank 0"),
        pytest.param(idx(np.zeros((0, 2, 2))), id="no images"),
        pytest.param(GZIPPED[:-9], id="gzip cut short"),
        pytest.param(GZIPPED[:-8] + b"\0" * 8, id="gzip checksum"),
        pytest.param(GZIPPED[:10] + b"\xff" + GZIPPED[11:], id="gzip damaged"),
        pytest.param(
            bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2**31, 2**31, 4)),
            id="sizes that overflow",
        ),
    ],
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, raw):
    if raw is not None:
        (tmp_path / "some-file").write_bytes(raw)
    with pytest.raises(DataError, match="some-file"):
        read_idx(tmp_path / "some-file")


def write_mnist(folder, train=12, test=5, labels=None):
    folder.mkdir()
    for part, count in (("train", train), ("t10k", test)):
        images = np.arange(count * 4).reshape(count, 2, 2)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        marks = np.arange(count) % 10 if labels is None else labels
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(marks))  # unpacked, also allowed


def test_idx_files_in_the_data_folder_are_a_dataset(tmp_path):
    write_mnist(tmp_path / "mnist")
    data = load_dataset("mnist", tmp_path)
    assert data.train.images.flatten().tolist() == list(range(48))
    assert data.train.images.shape == (12, 1, 2, 2)
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4]
    assert data.preprocessing.shape == (1, 2, 2)


@pytest.mark.parametrize("labels", [np.zeros(4), np.full(12, 10)], ids=["fewer", "a class 10"])
def test_labels_that_do_not_belong_to_the_images_are_refused(tmp_path, labels):
    write_mnist(tmp_path / "mnist", test=12, labels=labels)
    with pytest.raises(DataError, match="do not belong together"):
        load_dataset("mnist", tmp_path)


@needs_fashion
def test_fashion_mnist_is_whole_and_has_its_published_mean_and_std():
    data = load_dataset("fashion-mnist", DATA_DIR)
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert torch.bincount(data.train.labels).tolist() == [6_000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1_000] * 10
    assert data.classes[int(data.train.labels[0])] == "ankle boot"
    assert data.preprocessing.mean[0] == pytest.approx(0.2860, abs=2e-3)
    assert data.preprocessing.std[0] == pytest.approx(0.3530, abs=2e-3)


def test_a_download_is_checked_and_put_in_place(tmp_path):
    path = tmp_path / "new" / "file.gz"
    md5 = hashlib.md5(b"payload", usedforsecurity=False).hexdigest()
    source = tmp_path / "source"
    source.write_bytes(b"payload")
    download(source.as_uri(), path, md5)
    assert path.read_bytes() == b"payload"
    assert list(path.parent.iterdir()) == [path]


def test_a_download_with_another_md5_writes_nothing(tmp_path):
    with pytest.raises(DataError, match=r"MD5 is [0-9a-f]{32}, published is 123; nothing"):
        download("http://x/f", tmp_path / "new" / "f", "123", lambda *_, **__: io.BytesIO(b"x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [OSError("no route to host"), TimeoutError("timed out"), http.client.IncompleteRead(b"ab")],
    ids=lambda e: type(e).__name__,
)
def test_a_download_that_fails_says_what_to_do(tmp_path, error):
    def urlopen(_url, timeout):
        assert timeout
        raise error

    with pytest.raises(DataError, match=r"cannot be fetched .*put the file there.*--data-dir"):
        download("http://x/f", tmp_path / "f", "123", urlopen)
    assert list(tmp_path.iterdir()) == []


def paint(path, grey, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3).save(path)


def test_a_folder_with_train_and_test_is_read_as_it_is(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for i in range(count):
            paint(tmp_path / part / "cat" / f"{i}.png", 10 * i)
            paint(tmp_path / part / "dog" / "deep" / f"{i}.PNG", 100 + 10 * i)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = load_dataset(str(tmp_path), tmp_path, size=(5, 5))
    assert data.classes == ("cat", "dog")
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 100, 110, 120]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.images[:, 2, 4, 4].tolist() == [0, 10, 100, 110]
    assert data.preprocessing.shape == (3, 5, 5)


def test_a_folder_without_a_split_holds_the_same_images_out_whenever_it_grows(tmp_path):
    def split(count):
        for i in range(count):
            paint(tmp_path / ("odd" if i % 2 else "train") / f"{i}.png", i)
        data = load_dataset(str(tmp_path), tmp_path, size=(4, 4))
        return [set(s.images[:, 0, 0, 0].tolist()) for s in (data.train, data.test)]

    train, test = split(40)
    more_train, more_test = split(100)
    assert train | test == set(range(40))
    assert not train & test
    assert train <= more_train
    assert test <= more_test
    assert 8 <= len(more_test) <= 33  # 20 expected, three sigmas and a bit


def only_one_class(root):
    paint(root / "cat" / "a.png", 1)


def an_empty_class(root):
    only_one_class(root)
    (root / "dog").mkdir()


def a_test_folder_without_a_class(root):
    for part in ("train/cat", "train/dog", "test/cat"):
        paint(root / part / "a.png", 1)


def too_few(root):
    for name in ("cat", "dog"):
        paint(root / name / "1.png", 1)  # its name says: for training


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (only_one_class, "at least two sub-folders"),
        (an_empty_class, r"dog: no .png"),
        (a_test_folder_without_a_class, r"test.dog: no .png"),
        (too_few, "alone in its class"),
    ],
)
def test_a_folder_that_is_no_dataset_is_refused(tmp_path, make, reason):
    make(tmp_path)
    with pytest.raises(DataError, match=reason):
        load_dataset(str(tmp_path), tmp_path)


def test_all_broken_images_are_listed_at_once_and_can_be_left_out(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for i in range(count):
            paint(tmp_path / part / "cat" / f"{i}.png", 10 * i, size=(8, 4 + i))
            paint(tmp_path / part / "dog" / f"{i}.png", 100)
    for name in ("train/cat/._0.png", "train/.hidden/x.png", "train/notes.txt", "test/dog/a.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    broken = {tmp_path / "train/cat/text.png": b"text", tmp_path / "test/dog/deep.png": None}
    for path, raw in broken.items():
        if raw is None:
            Image.new("I;16", (4, 4)).save(path)
        else:
            path.write_bytes(raw)
    with pytest.raises(DataError, match="2 of 12 images cannot be read; give --skip-broken") as it:
        load_dataset(str(tmp_path), tmp_path)
    assert it.value.__notes__ == [
        f"{tmp_path}/train/cat/text.png: not a PNG, JPEG or WebP image",
        f"{tmp_path}/test/dog/deep.png: 16 bits a channel: save it with 8",
    ]
    data = load_dataset(str(tmp_path), tmp_path, size=(5, 7), fit="crop", skip_broken=True)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 100, 100, 100]
    assert data.summary() == (
        f"{tmp_path.name}/: 6 images to train on, 4 to test on; 2 classes; 4x6 to 6x8 pixels, "
        f"cropped to 5x7; other files: 2; broken images skipped: 2"
    )
    for path in (tmp_path / "test" / "cat").iterdir():
        path.write_bytes(b"cut")
    with pytest.raises(DataError, match=r"test/cat: no image in it can be read"):
        load_dataset(str(tmp_path), tmp_path, skip_broken=True)


def test_a_model_s_preprocessing_and_order_of_classes_are_taken(tmp_path):
    for name, grey in (("cat", 10), ("dog", 100), ("eel", 200)):
        for i in range(4):
            paint(tmp_path / name / f"{i}.png", grey)
    wanted = Preprocessing((3, 5), 1, (0.5,), (0.25,), invert=True, fit="crop")
    how = {"preprocessing": wanted, "classes": ("eel", "cat", "dog")}
    data = load_dataset(str(tmp_path), tmp_path, **how)
    assert (data.preprocessing, data.classes) == (wanted, ("eel", "cat", "dog"))
    for split in (data.train, data.test):
        assert split.images.shape[1:] == (1, 3, 5)
        greys = torch.tensor([55, 245, 155], dtype=torch.uint8)[split.labels]
        assert torch.equal(split.images[:, 0, 0, 0], greys)
    whole = load_dataset(str(tmp_path), tmp_path, **how, whole=True)
    assert (len(whole.train), len(whole.test)) == (0, 12)
    with pytest.raises(DataError, match="it lacks fox and has dog too"):
        load_dataset(str(tmp_path), tmp_path, classes=("eel", "cat", "fox"))
    with pytest.raises(DataError, match=r"digits has images \(1, 8, 8\)"):
        load_dataset("digits", tmp_path, preprocessing=wanted)


def test_photos_are_decoded_at_a_smaller_scale_unless_the_model_s_were_not(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 128, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [tmp_path / name for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")]
    for path, pixels in zip(paths, noise, strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, exif=exif)
    data = load_dataset(str(tmp_path), tmp_path, size=(16, 12), fit="pad")
    assert data.found.sizes == {(96, 128)}
    for draft, size in ((True, (32, 24)), (False, (128, 96))):  # twice 12 x 16, turned
        images = [Image.open(path) for path in paths]
        how = replace(data.preprocessing, draft=draft)
        for image in images:
            how.set_scale(image)
        pixels = torch.from_numpy(np.stack([how.prepare(image) for image in images]))
        got = load_dataset(str(tmp_path), tmp_path, preprocessing=how, whole=True).test.images
        assert torch.equal(got, pixels)
        assert {image.size for image in images} == {size}
        assert all((pixels == x).flatten(1).all(1).any() for x in data.train.images) == draft


@pytest.fixture
def folder(tmp_path):
    """800 small images of noise in two classes, each of a brightness of its own."""
    noise = np.random.default_rng(1).integers(0, 200, (800, 6, 5, 3), np.uint8)
    for i, pixels in enumerate(noise):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + 55 * (i % 2)).save(path)
    return tmp_path / "images"


def test_a_large_folder_is_read_file_by_file_and_trains_to_the_same_bits(folder):
    seen = []
    load = partial(load_dataset, str(folder), folder, size=(6, 5))
    kept = load(progress=lambda *moved: seen.append(moved))
    lazy = load(max_bytes=800 * 90 - 1)
    assert seen == [(i, 800) for i in range(1, 801)]
    assert lazy.preprocessing == kept.preprocessing
    assert lazy.summary() == kept.summary()
    assert lazy.digest() == load(max_bytes=0).digest() != kept.digest()
    ended = []
    for data in (kept, lazy):
        torch.manual_seed(0)
        module = NetworkConfig("mlp", (3, 6, 5), 2, (8,), (0.2,)).build()
        recipe = Recipe(epochs=2, batch_size=50, shift=1, flip=True)
        scores = [(e.loss, e.validation_accuracy) for e in fit(
            module, data.train, data.preprocessing.normalize, recipe, fabric=launch("cpu")
        )]  # fmt: skip
        ended.append((scores, evaluate(module, data.test, data.preprocessing.normalize, 10)))
        ended[-1] += (choose(data.test, 2, data.preprocessing), module.state_dict())
    assert ended[0][:3] == ended[1][:3]
    assert all(torch.equal(t, ended[1][3][name]) for name, t in ended[0][3].items())


class Counting(Preprocessing):
    """Counts the images that it has prepared."""

    calls: ClassVar[list[int]] = []

    def prepare(self, image):
        self.calls.append(1)
        return super().prepare(image)


def test_few_images_are_decoded_before_they_are_asked_for(folder):
    Counting.calls.clear()
    how = Counting((6, 5), 3, (0.5,) * 3, (0.25,) * 3)
    data = load_dataset(str(folder), folder, preprocessing=how, max_bytes=0)
    decoded = len(Counting.calls)
    assert decoded == 800 + 1  # each once, and one for the shape
    batches = data.train.batches(40)
    for number in range(1, 4):
        assert len(next(batches)) == 40
        sleep(0.2)
        assert len(Counting.calls) - decoded <= 256 + 40 * number < len(data.train)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("change", ["gone", "cut", "other pixels"])
def test_a_file_that_changes_after_it_was_read_is_named(folder, change):
    data = load_dataset(str(folder), folder, size=(6, 5), max_bytes=0)
    path = folder / "a" / "0.png"
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(b"cut" if change == "cut" else (folder / "a" / "2.png").read_bytes())
    with pytest.raises(DataError, match=r"a/0\.png (cannot be|has changed).*--resume"):
        [*data.train.batches(100), *data.test.batches(100)]


def test_a_split_is_taken_and_batched_in_order(digits):
    rows = digits.test.take(torch.tensor([5, 3, 3]))
    assert torch.equal(rows.images, digits.test.images[[5, 3, 3]])
    batches = list(digits.test.batches(150))
    assert [len(b) for b in batches] == [150, 150, 60]
    assert torch.equal(torch.cat([b.labels for b in batches]), digits.test.labels)


IMAGES = torch.arange(1, 25, dtype=torch.uint8).view(1, 2, 3, 4)


def moved(image, down, right):
    """Shift [C, H, W] by hand, pixel by pixel; black comes in."""
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


def test_every_shift_comes_about_as_often_as_every_other():
    draws = 2500
    shifted = augment(IMAGES.expand(draws, -1, -1, -1), shift=2, flip=False)
    assert shifted.dtype == torch.uint8
    allowed = [moved(IMAGES[0], d, r) for d in range(-2, 3) for r in range(-2, 3)]
    counts = torch.tensor([(shifted == one).flatten(1).all(1).sum() for one in allowed])
    assert counts.sum() == draws  # no image is anything else
    assert ((counts - 100).abs() <= 5 * sqrt(100)).all()


def test_about_half_of_the_images_are_mirrored():
    draws = 2000
    got = augment(IMAGES.expand(draws, -1, -1, -1), shift=0, flip=True)
    mirrored = (got == IMAGES.flip(-1)).flatten(1).all(1)
    assert torch.equal(got[~mirrored], IMAGES.expand(draws, -1, -1, -1)[~mirrored])
    assert abs(mirrored.sum() - draws / 2) <= 5 * sqrt(draws / 4)


def test_nothing_asked_changes_nothing():
    assert augment(IMAGES, 0, flip=False) is IMAGES


@pytest.mark.parametrize(("shift", "flip"), [(1, False), (0, True), (3, True)])
def test_the_global_generator_decides(shift, flip):
    images = IMAGES.expand(50, -1, -1, -1)
    torch.manual_seed(1)
    first, other = augment(images, shift, flip), augment(images, shift, flip)
    torch.manual_seed(1)
    assert torch.equal(augment(images, shift, flip), first)
    assert not torch.equal(first, other)

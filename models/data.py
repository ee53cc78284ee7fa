"""Datasets: digits, Fashion-MNIST, MNIST, and a folder of images with one sub-folder a class.

All of a dataset lies in memory as uint8, and batches are sliced from it.
"""

import gzip
import hashlib
import http.client
import io
import math
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dropserve.models.errors import DataError
from dropserve.models.preprocessing import Fit, Pixels, Preprocessing

NAMED = ("digits", "fashion-mnist", "mnist")

_FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_DIGIT_CLASSES = tuple("0123456789")
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"

# Published MD5 sums: github.com/zalandoresearch/fashion-mnist (README) and the MNIST mirror's.
_FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_TEST_SHARE = 0.2  # where a dataset comes without a test split of its own

_FITTED = {"stretch": "stretched", "crop": "cropped", "pad": "padded"}

Fetch = Callable[[str], bytes]
Rows = list[tuple[str, int, Pixels]]
"""Name of a file, label, and pixels [C, H, W]."""


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        """Pick rows by an index tensor or a boolean mask."""
        return Split(self.images[index], self.labels[index])

    def digest(self) -> str:
        """SHA-256 over all images, then all labels."""
        return _digest(self)

    def batches(self, size: int) -> Iterator["Split"]:
        """Yield it in order, `size` images at a time."""
        for start in range(0, len(self), size):
            yield Split(self.images[start : start + size], self.labels[start : start + size])


@dataclass
class Found:
    """What a folder of images holds.

    Attributes:
        sizes: (height, width) of the images, in pixels.
        others: files that are not images by their names.
        broken: why an image cannot be read, one text each.
    """

    sizes: set[tuple[int, int]] = field(default_factory=set)
    others: int = 0
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, their classes, and how a picture becomes an input."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    preprocessing: Preprocessing
    found: Found = field(default_factory=Found)

    def summary(self) -> str:
        """Say in one line what there is, and how images are fitted; sizes are height x width."""
        used = self.preprocessing.size
        sizes = sorted(self.found.sizes or {used}, key=math.prod)
        smallest, largest, wanted = ("x".join(map(str, s)) for s in (sizes[0], sizes[-1], used))
        pixels = smallest if len(sizes) == 1 else f"{smallest} to {largest}"
        fitted = f", {_FITTED[self.preprocessing.fit]} to {wanted}" if sizes != [used] else ""
        others, broken = self.found.others, len(self.found.broken)
        return (
            f"{self.name}: {len(self.train):,} images to train on, {len(self.test):,} to test on; "
            f"{len(self.classes)} classes; {pixels} pixels{fitted}"
            + (f"; other files: {others:,}" if others else "")
            + (f"; broken images skipped: {broken:,}" if broken else "")
        )

    def origin(self) -> dict[str, Any]:
        """Say what a model was trained on, for its checkpoint."""
        sizes = {"train": len(self.train), "test": len(self.test)}
        return {"name": self.name, "digest": self.digest(), **sizes}

    def digest(self) -> str:
        """SHA-256 over all images and labels, train then test."""
        return _digest(self.train, self.test)


def load_dataset(
    name: str,
    data_dir: Path,
    *,
    size: tuple[int, int] | None = None,
    invert: bool = False,
    fit: Fit = "stretch",
    preprocessing: Preprocessing | None = None,
    classes: tuple[str, ...] | None = None,
    skip_broken: bool = False,
    whole: bool = False,
) -> Dataset:
    """Load a dataset by name, or a folder of images by its path.

    Args:
        name: "digits", "fashion-mnist", "mnist", or a folder: one sub-folder a class, or `train`
            and `test` folders of such.
        data_dir: where IDX files lie, or are downloaded to, in a sub-folder called like the set.
        size: (height, width) in pixels that a folder's images are resized to (default 32 x 32).
        invert: turn dark into light in every picture that comes in: a folder's, and those that are
            served. The named sets are pixels already, and what is dark in them stays dark.
        fit: how images of other proportions are fitted, as `Preprocessing` has it; likewise.
        preprocessing: a model's, in place of `size`, `invert` and `fit`, and of what would be
            measured.
        classes: a model's, in its order; None: a folder's are in the order of their names.
        skip_broken: leave out images of a folder that cannot be read.
        whole: of a folder without `train` and `test`, all images are to test on.

    Raises:
        DataError: no such dataset, or its files are missing, damaged or empty, or do not fit
            `preprocessing` or `classes`. All images of a folder that cannot be read are named.
    """
    if name in NAMED:
        if size is not None:
            raise DataError(f"{name} has a size of its own: size is for a folder of images")
        dataset = _named(name, data_dir)
        prepared = preprocessing or replace(dataset.preprocessing, invert=invert, fit=fit)
    elif Path(name).is_dir():
        plain = Preprocessing(size or (32, 32), 3, (0.0,) * 3, (1.0,) * 3, invert, fit)
        dataset = _folder(Path(name), preprocessing or plain, skip_broken, whole)
        images = dataset.train.images
        prepared = preprocessing or Preprocessing.measured(images, invert, fit)
    else:
        raise DataError(f"no dataset {name!r}: give {', '.join(NAMED)}, or a folder of images")
    if dataset.preprocessing.shape != prepared.shape:
        raise DataError(
            f"{name} has images {dataset.preprocessing.shape} (channels, height, width), "
            f"the model takes {prepared.shape}"
        )
    return _with_classes(replace(dataset, preprocessing=prepared), classes or dataset.classes)


def _with_classes(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """Number the labels as a model does."""
    missing, unknown = (
        set(a) - set(b) for a, b in ((classes, dataset.classes), (dataset.classes, classes))
    )
    if missing or unknown:
        differ = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        differ += [f"has {', '.join(sorted(unknown))} too"] if unknown else []
        raise DataError(
            f"{dataset.name} has other classes than the model: it {' and '.join(differ)}"
        )
    number = torch.tensor([classes.index(name) for name in dataset.classes])
    train, test = (Split(s.images, number[s.labels]) for s in (dataset.train, dataset.test))
    return replace(dataset, classes=classes, train=train, test=test)


def _named(name: str, data_dir: Path) -> Dataset:
    if name == "digits":
        return _digits()
    classes, sums, url = {
        "fashion-mnist": (_FASHION_CLASSES, _FASHION_FILES, _FASHION_URL),
        "mnist": (_DIGIT_CLASSES, _MNIST_FILES, _MNIST_URL),
    }[name]
    return _from_idx(name, classes, _idx_files(data_dir / name, sums, url))


def _digest(*splits: Split) -> str:
    sha = hashlib.sha256()
    for split in splits:
        sha.update(split.images.contiguous().numpy().data)
        sha.update(split.labels.contiguous().numpy().data)
    return sha.hexdigest()


def _digits() -> Dataset:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, sixteen greys, no download."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    parts = train_test_split(
        images, data.target, test_size=_TEST_SHARE, random_state=0, stratify=data.target
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(np.ascontiguousarray(p)) for p in parts)
    train, test = Split(train_x, train_y.long()), Split(test_x, test_y.long())
    return Dataset("digits", _DIGIT_CLASSES, train, test, Preprocessing.measured(train_x))


def _from_idx(name: str, classes: tuple[str, ...], files: list[Path]) -> Dataset:
    train_x, train_y, test_x, test_y = (read_idx(path) for path in files)
    train = Split(train_x.unsqueeze(1), train_y.long())
    test = Split(test_x.unsqueeze(1), test_y.long())
    for split in (train, test):
        if len(split.images) != len(split.labels) or int(split.labels.max()) >= len(classes):
            raise DataError(f"{name}: images and labels do not belong together")
    return Dataset(name, classes, train, test, Preprocessing.measured(train.images))


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or not: uint8, in the shape its header gives.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {error}") from error
    rank = raw[3] if len(raw) > 4 and raw[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * rank
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if not rank or not len(raw) == start + math.prod(shape) > start:
        raise DataError(f"{path}: not an IDX file of unsigned bytes, or empty, or cut short")
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).view(shape)


def _idx_files(folder: Path, sums: dict[str, str], url: str) -> list[Path]:
    """Find the four files in `folder`, downloading those that are missing."""
    for name, md5 in sums.items():
        if not (folder / name).exists() and not (folder / name.removesuffix(".gz")).exists():
            download(url + name, folder / name, md5)
    return [f if (f := folder / n).exists() else f.with_suffix("") for n in sums]


def download(url: str, path: Path, md5: str, fetch: Fetch | None = None) -> None:
    """Fetch a file, check its published MD5, and only then put it in place.

    Raises:
        DataError: it cannot be fetched, or what came is not the file.
    """
    try:
        raw = (fetch or _fetch)(url)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{path} is not there and {url} cannot be fetched ({error}); "
            f"put the file there, or name the folder that has it with --data-dir"
        ) from error
    if (got := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != md5:
        raise DataError(f"{url}: MD5 is {got}, published is {md5}; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(raw)
    part.replace(path)


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310  our own constants
        raw: bytes = response.read()
    return raw


def _folder(root: Path, preprocessing: Preprocessing, skip_broken: bool, whole: bool) -> Dataset:
    """One sub-folder a class, or `train` and `test` folders of such."""
    split = (root / "train").is_dir() and (root / "test").is_dir()
    parts = [root / "train", root / "test"] if split else [root]
    classes = tuple(path.name for path in _visible(parts[0], "*") if path.is_dir())
    if len(classes) < 2:
        raise DataError(f"{parts[0]}: needs at least two sub-folders, one a class")
    found = Found()
    for folder in {root, *parts}:
        found.others += sum(path.is_file() for path in _visible(folder, "*"))
    parts = parts[-1:] if whole else parts
    read = [_read_images(part, classes, preprocessing, found) for part in parts]
    if found.broken and not skip_broken:
        count = f"{len(found.broken):,} of {len(found.broken) + sum(map(len, read)):,} images"
        error = DataError(
            f"{root}: {count} cannot be read; give --skip-broken to go on without them"
        )
        for reason in found.broken:
            error.add_note(reason)
        raise error
    splits = [_stack(part, classes, rows) for part, rows in zip(parts, read, strict=True)]
    if whole:
        train, test = splits[0].take(torch.tensor([], dtype=torch.int64)), splits[0]
    elif split:
        train, test = splits
    else:
        held_out = _held_out([name for name, _, _ in read[0]], splits[0].labels)
        train, test = splits[0].take(~held_out), splits[0].take(held_out)
    name = f"{root.resolve().name}/"  # the slash tells it from the named sets
    return Dataset(name, classes, train, test, preprocessing, found)


def _visible(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield what is in a folder, in order, but for names that begin with a dot.

    macOS writes `._cat.jpg` beside `cat.jpg`, which is no image.
    """
    for path in sorted(folder.glob(pattern)):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _held_out(names: list[str], labels: Tensor) -> Tensor:
    """Choose about a fifth for testing by the hash of each file's name, at least one a class.

    A picture stays where it is when others come. Returns bool [N].
    """
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    chosen = torch.tensor([digest[0] < 256 * _TEST_SHARE for digest in digests])
    for label in range(int(labels.max()) + 1):
        members = sorted((labels == label).nonzero().flatten().tolist(), key=digests.__getitem__)
        if len(members) < 2:
            raise DataError(f"{names[members[0]]} is alone in its class: there is none to test on")
        chosen[members[0]], chosen[members[-1]] = True, False
    return chosen


def _read_images(
    root: Path, classes: Iterable[str], preprocessing: Preprocessing, found: Found
) -> Rows:
    """Read what can be read; `found` is told of it and of the rest."""
    rows: Rows = []
    for label, name in enumerate(classes):
        files = [path for path in _visible(root / name, "**/*") if path.is_file()]
        images = [path for path in files if path.suffix.lower() in _IMAGE_SUFFIXES]
        found.others += len(files) - len(images)
        if not images:
            raise DataError(f"{root / name}: no .png, .jpg or .webp image in it")
        for path in images:
            try:
                pixels, size = _read_image(path, preprocessing)
            except UnidentifiedImageError:
                found.broken.append(f"{path}: not a PNG, JPEG or WebP image")
            except Exception as error:  # Pillow's parsers raise whatever a bad file makes them
                found.broken.append(f"{path}: {getattr(error, 'strerror', None) or error}")
            else:
                found.sizes.add(size)
                rows.append((path.relative_to(root).as_posix(), label, pixels))
    return rows


def _stack(root: Path, classes: Sequence[str], rows: Rows) -> Split:
    labels = [label for _, label, _ in rows]
    for label in sorted({*range(len(classes))} - {*labels}):
        raise DataError(f"{root / classes[label]}: no image in it can be read")
    return Split(torch.from_numpy(np.stack([pixels for *_, pixels in rows])), torch.tensor(labels))


def _read_image(path: Path, preprocessing: Preprocessing) -> tuple[Pixels, tuple[int, int]]:
    """Return an image's pixels [C, H, W], and the (height, width) that it had."""
    raw = path.read_bytes()
    if raw[:4] == b"\x89PNG" and raw[24:25] == b"\x10":
        raise ValueError("16 bits a channel, which would be clipped: save it with 8")
    with Image.open(io.BytesIO(raw), formats=("JPEG", "PNG", "WEBP")) as image:
        return preprocessing.prepare(image), (image.height, image.width)

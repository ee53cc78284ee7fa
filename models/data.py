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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import DataError
from models.preprocessing import Pixels, Preprocessing

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

Fetch = Callable[[str], bytes]


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


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, their classes, and how a picture becomes an input."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    preprocessing: Preprocessing

    def origin(self) -> dict[str, Any]:
        """Say what a model was trained on, for its checkpoint."""
        sizes = {"train": len(self.train), "test": len(self.test)}
        return {"name": self.name, "digest": self.digest(), **sizes}

    def digest(self) -> str:
        """SHA-256 over all images and labels, train then test."""
        return _digest(self.train, self.test)


def load_dataset(
    name: str, data_dir: Path, *, size: int | None = None, invert: bool = False
) -> Dataset:
    """Load a dataset by name, or a folder of images by its path.

    Args:
        name: "digits", "fashion-mnist", "mnist", or a folder: one sub-folder a class, or `train`
            and `test` folders of such.
        data_dir: where IDX files lie, or are downloaded to, in a sub-folder called like the set.
        size: side in pixels that a folder's images are resized to (default 32).
        invert: turn dark into light in every picture that comes in: a folder's, and those that are
            served. The named sets are pixels already, and what is dark in them stays dark.

    Raises:
        DataError: no such dataset, or its files are missing, damaged or empty.
    """
    if size is not None and not Path(name).is_dir():
        raise DataError(f"{name} has a size of its own: size is for a folder of images")
    if name == "digits":
        dataset = _digits()
    elif name == "fashion-mnist":
        files = _idx_files(data_dir / name, _FASHION_FILES, _FASHION_URL)
        dataset = _from_idx(name, _FASHION_CLASSES, files)
    elif name == "mnist":
        files = _idx_files(data_dir / name, _MNIST_FILES, _MNIST_URL)
        dataset = _from_idx(name, _DIGIT_CLASSES, files)
    elif Path(name).is_dir():
        return _folder(Path(name), size or 32, invert)
    else:
        raise DataError(f"no dataset {name!r}: give digits, fashion-mnist, mnist, or a folder")
    if invert:
        dataset = replace(dataset, preprocessing=replace(dataset.preprocessing, invert=True))
    return dataset


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


def _folder(root: Path, size: int, invert: bool) -> Dataset:
    """One sub-folder a class, or `train` and `test` folders of such."""
    split = (root / "train").is_dir() and (root / "test").is_dir()
    train_root = root / "train" if split else root
    classes = tuple(sorted(d.name for d in train_root.iterdir() if d.is_dir()))
    if len(classes) < 2:
        raise DataError(f"{train_root}: needs at least two sub-folders, one a class")
    plain = Preprocessing((size, size), 3, (0.0,) * 3, (1.0,) * 3, invert)
    names, train = _read_images(train_root, classes, plain)
    if split:
        _, test = _read_images(root / "test", classes, plain)
    else:
        held_out = _held_out(names, train.labels)
        train, test = train.take(~held_out), train.take(held_out)
    name = f"{root.resolve().name}/"  # the slash tells it from the named sets
    return Dataset(name, classes, train, test, Preprocessing.measured(train.images, invert))


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
    root: Path, classes: Iterable[str], preprocessing: Preprocessing
) -> tuple[list[str], Split]:
    names, images, labels = [], [], []
    for label, name in enumerate(classes):
        files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not files:
            raise DataError(f"{root / name}: no .png, .jpg or .webp image in it")
        for path in files:
            images.append(_read_image(path, preprocessing))
            names.append(path.relative_to(root).as_posix())
            labels.append(label)
    return names, Split(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _read_image(path: Path, preprocessing: Preprocessing) -> Pixels:
    raw = path.read_bytes()
    if raw[:4] == b"\x89PNG" and raw[24:25] == b"\x10":
        raise DataError(f"{path}: 16 bits a channel, which would be clipped: save it with 8")
    try:
        with Image.open(io.BytesIO(raw), formats=("JPEG", "PNG", "WEBP")) as image:
            return preprocessing.prepare(image)
    except Exception as error:  # Pillow's parsers raise whatever a bad file makes them
        raise DataError(f"{path}: cannot be read as an image: {error}") from error

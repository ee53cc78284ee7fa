"""Datasets: digits, Fashion-MNIST, MNIST, and folders of images with a sub-folder per class.

A dataset is held in memory whole, as uint8; a folder that would take too much of it is read file
by file, again in each epoch. Training images are augmented batch by batch.
"""

import gzip
import hashlib
import http.client
import io
import math
import os
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dropserve.models.errors import DataError
from dropserve.models.image_formats import IMAGE_FORMATS, IMAGE_SUFFIXES
from dropserve.models.preprocessing import Fit, Pixels, Preprocessing
from dropserve.models.storage import replace_durably

NAMED = ("digits", "fashion-mnist", "mnist")
_DIGITS = tuple("0123456789")
_IDX_FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
_IDX_SETS = {  # classes, address, and the published MD5 sums of the files
    "fashion-mnist": (
        ("t-shirt", "trouser", "pullover", "dress", "coat",
         "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
         "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    "mnist": (
        _DIGITS,
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
         "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
}  # fmt: skip
_TEST_SHARE = 0.2  # where a dataset has no test split of its own
MAX_BYTES = 4 * 2**30
"""Bytes of a folder's decoded images up to which they are held in memory."""
_AHEAD = 256
"""Images that are decoded before they are asked for."""
_MEASURED = 10_000  # training images from which mean and std are taken
T = TypeVar("T")
R = TypeVar("R")


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

    def labelled(self, labels: Tensor) -> "Split":
        """Return the same images with other labels."""
        return Split(self.images, labels)

    def to(self, device: torch.device) -> "Split":
        """Move the rows to a device."""
        return Split(self.images.to(device), self.labels.to(device))

    def read(self, rows: Iterable[Tensor]) -> Iterator["Split"]:
        """Yield the rows of each index tensor."""
        return map(self.take, rows)

    def batches(self, size: int) -> Iterator["Split"]:
        """Yield the rows in order, `size` at a time."""
        starts = range(0, len(self), size)
        return self.read(torch.arange(start, min(start + size, len(self))) for start in starts)

    def digest(self, *others: "Split") -> str:
        """SHA-256 over all images, then all labels; then those of other splits."""
        sha = hashlib.sha256()
        for split in (self, *others):
            sha.update(split.content().contiguous().numpy().data)
            sha.update(split.labels.contiguous().numpy().data)
        return sha.hexdigest()

    def content(self) -> Tensor:
        """Return what a digest is taken of: uint8 [N, ...]."""
        return self.images


class FileSplit(Split):
    """A split whose images are files, decoded by threads when they are read.

    Its digest is that of the SHA-256 of each image's pixels; DataError if a file's are others now.
    """

    _files: Sequence[Path]
    _digests: Tensor  # uint8 [N, 32]
    _how: Preprocessing

    def __init__(
        self, files: Sequence[Path], digests: Tensor, labels: Tensor, preprocessing: Preprocessing
    ) -> None:
        fields = {"labels": labels, "_digests": digests, "_files": files, "_how": preprocessing}
        self.__dict__.update(fields)  # the class is frozen

    @property
    def images(self) -> Tensor:
        """Decode all of them."""
        if not len(self):
            return torch.zeros(0, *self._how.shape, dtype=torch.uint8)
        return next(self.batches(len(self))).images

    def take(self, index: Tensor) -> "FileSplit":
        """Pick rows; nothing is decoded."""
        rows = torch.arange(len(self))[index]
        files = [self._files[row] for row in rows.tolist()]
        return FileSplit(files, self._digests[rows], self.labels[rows], self._how)

    def labelled(self, labels: Tensor) -> "FileSplit":
        """Return the same files with other labels."""
        return FileSplit(self._files, self._digests, labels, self._how)

    def to(self, device: torch.device) -> Split:  # noqa: ARG002  the batches are moved
        """Return the split as it is, because its images are not in memory."""
        return self

    def read(self, rows: Iterable[Tensor]) -> Iterator[Split]:
        """Yield the rows of each index tensor, decoded; at most `_AHEAD` more images are held."""
        rows = list(rows)
        decoded = _in_threads(self._decode, chain.from_iterable(r.tolist() for r in rows))
        for each in rows:
            yield Split(
                torch.from_numpy(np.stack([*islice(decoded, len(each))])), self.labels[each]
            )

    def content(self) -> Tensor:
        """Return the digests [N, 32], so that nothing is decoded."""
        return self._digests

    def _decode(self, row: int) -> Pixels:
        path = self._files[row]
        try:
            pixels, _ = _decode(path, self._how)
        except Exception as error:  # Pillow's parsers raise anything for a bad file
            reason = f"cannot be read any more: {getattr(error, 'strerror', None) or error}"
        else:
            if hashlib.sha256(pixels.data).digest() == self._digests[row].numpy().tobytes():
                return pixels
            reason = "has changed since the start"
        raise DataError(
            f"{path} {reason}; put it back and continue with --resume, or train anew with --restart"
        )


@dataclass
class Found:
    """The files of a folder: (height, width) of its images, other files, unreadable images."""

    sizes: set[tuple[int, int]] = field(default_factory=set)
    others: int = 0
    broken: list[str] = field(default_factory=list)  # the reason of each


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, their classes, and how an image becomes an input."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    preprocessing: Preprocessing
    found: Found = field(default_factory=Found)

    def summary(self) -> str:
        """Describe it in one line; sizes are height x width."""
        used = self.preprocessing.size
        fitted = {"stretch": "stretched", "crop": "cropped", "pad": "padded"}
        sizes = sorted(self.found.sizes or {used}, key=math.prod)
        smallest, largest, wanted = ("x".join(map(str, s)) for s in (sizes[0], sizes[-1], used))
        others, broken = self.found.others, len(self.found.broken)
        return (
            f"{self.name}: {len(self.train):,} images to train on, {len(self.test):,} to test on; "
            f"{len(self.classes)} classes; {smallest}"
            + (f" to {largest} pixels" if len(sizes) > 1 else " pixels")
            + (f", {fitted[self.preprocessing.fit]} to {wanted}" if sizes != [used] else "")
            + (f"; other files: {others:,}" if others else "")
            + (f"; broken images skipped: {broken:,}" if broken else "")
        )

    def origin(self) -> dict[str, Any]:
        """Describe what a model was trained on, for its checkpoint."""
        sizes = {"train": len(self.train), "test": len(self.test)}
        return {"name": self.name, "digest": self.digest(), **sizes}

    def digest(self) -> str:
        """SHA-256 over all images and labels, train then test."""
        return self.train.digest(self.test)


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
    max_bytes: int = MAX_BYTES,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Dataset:
    """Load a dataset by name: "digits", "fashion-mnist", "mnist", or the path of a folder.

    A folder has one sub-folder of images a class, or `train` and `test` folders of such. IDX files
    are in `data_dir`, or downloaded to it, in a sub-folder named as the dataset.

    A folder's images are resized to `size`, (height, width), by default 32 x 32; `invert` and `fit`
    are as in `Preprocessing`, for them and for those that are served. The named datasets are pixels
    already. In place of all three, and of mean and std as they are measured, `preprocessing` is a
    saved model's; so are `classes`, in its order. `skip_broken` leaves out images that cannot be
    read; `whole` tests on all images of a folder without `train` and `test`. Images that would take
    more than `max_bytes` are all read once, and then again whenever they are needed. `progress` is
    called with (files read, files in all) of a folder.

    Raises:
        DataError: no such dataset, or its files are missing, damaged or empty, or do not fit
            `preprocessing` or `classes`. All images of a folder that cannot be read are named.
    """
    found, shown = Found(), name
    if name in NAMED:
        if size is not None:
            raise DataError(f"{name} has a size of its own: size is for a folder of images")
        own, train, test = _digits() if name == "digits" else _idx(name, data_dir / name)
    elif Path(name).is_dir():
        how = preprocessing or Preprocessing(
            size or (32, 32), 3, (0.0,) * 3, (1.0,) * 3, invert, fit, draft=True
        )
        reader = _Reader(how, found, max_bytes, progress)
        own, train, test = _folder(Path(name), reader, skip_broken=skip_broken, whole=whole)
        shown = f"{Path(name).resolve().name}/"  # the slash marks it as a folder
    else:
        raise DataError(f"no dataset {name!r}: give {', '.join(NAMED)}, or a folder of images")
    if preprocessing is None:
        first = train.take(torch.arange(min(len(train), _MEASURED)))
        measured = Preprocessing.measured(batch.images for batch in first.batches(_AHEAD))
        preprocessing = replace(measured, invert=invert, fit=fit, draft=name not in NAMED)
    elif (shape := tuple(test.take(torch.arange(1)).images.shape[1:])) != preprocessing.shape:
        raise DataError(
            f"{name} has images {shape} (channels, height, width), "
            f"the model takes {preprocessing.shape}"
        )
    if classes is not None:
        missing, unknown = sorted({*classes} - {*own}), sorted({*own} - {*classes})
        if missing or unknown:
            differ = [f"lacks {', '.join(missing)}"] if missing else []
            differ += [f"has {', '.join(unknown)} too"] if unknown else []
            raise DataError(f"{shown} has other classes than the model: it {' and '.join(differ)}")
        order = torch.tensor([classes.index(c) for c in own])
        train, test = (s.labelled(order[s.labels]) for s in (train, test))
    return Dataset(shown, classes or own, train, test, preprocessing, found)


def _digits() -> tuple[tuple[str, ...], Split, Split]:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, sixteen greys, no download."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    both = Split(images, torch.from_numpy(data.target).long())
    train, test = train_test_split(
        torch.arange(len(both)), test_size=_TEST_SHARE, random_state=0, stratify=data.target
    )
    return _DIGITS, both.take(train), both.take(test)


def _idx(name: str, folder: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Read the four files in `folder`, gzipped or not, after downloading those that are missing."""
    classes, url, sums = _IDX_SETS[name]
    arrays = []
    for file, md5 in zip(_IDX_FILES, sums, strict=True):
        path = folder / file
        if not path.exists() and not path.with_suffix("").exists():
            download(url + file, path, md5)
        arrays.append(read_idx(path if path.exists() else path.with_suffix("")))
    train, test = (Split(x.unsqueeze(1), y.long()) for x, y in (arrays[:2], arrays[2:]))
    for split in (train, test):
        if len(split.images) != len(split.labels) or int(split.labels.max()) >= len(classes):
            raise DataError(f"{name}: images and labels do not belong together")
    return classes, train, test


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or not: uint8, in the shape its header gives."""
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


def download(
    url: str, path: Path, md5: str, urlopen: Callable[..., BinaryIO] = urllib.request.urlopen
) -> None:
    """Fetch a file, check its published MD5, and only then write it."""
    try:
        with urlopen(url, timeout=60) as response:
            raw = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{path} is not there and {url} cannot be fetched ({error}); "
            f"put the file there, or name the folder that has it with --data-dir"
        ) from error
    if (got := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != md5:
        raise DataError(f"{url}: MD5 is {got}, published is {md5}; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, raw)


def _folder(
    root: Path, reader: "_Reader", *, skip_broken: bool, whole: bool
) -> tuple[tuple[str, ...], Split, Split]:
    """Read a folder with one sub-folder a class, or with `train` and `test` folders of such."""
    found = reader.found
    split = (root / "train").is_dir() and (root / "test").is_dir()
    parts = [root / "train", root / "test"] if split else [root]
    classes = tuple(path.name for path in _visible(parts[0], "*") if path.is_dir())
    if len(classes) < 2:
        raise DataError(f"{parts[0]}: needs at least two sub-folders, one a class")
    for folder in {root, *parts}:
        found.others += sum(path.is_file() for path in _visible(folder, "*"))
    parts = parts[-1:] if whole else parts
    read = reader.read([_listed(part, classes, found) for part in parts])
    if found.broken and not skip_broken:
        count = f"{len(found.broken):,} of {len(found.broken) + sum(map(len, read)):,} images"
        error = DataError(
            f"{root}: {count} cannot be read; give --skip-broken to go on without them"
        )
        for reason in found.broken:
            error.add_note(reason)
        raise error
    splits = []
    for part, rows in zip(parts, read, strict=True):
        if empty := {*range(len(classes))} - {row.label for row in rows}:
            raise DataError(f"{part / classes[min(empty)]}: no image in it can be read")
        splits.append(reader.split(rows))
    train, test = splits[0], splits[-1]
    if whole:
        train = test.take(torch.tensor([], dtype=torch.int64))
    elif not split:
        names = [row.path.relative_to(root).as_posix() for row in read[0]]
        held_out = _held_out(names, train.labels)
        train, test = train.take(~held_out), train.take(held_out)
    return classes, train, test


def _visible(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield the paths in a folder, in order, without those such as macOS's `._cat.jpg`."""
    for path in sorted(folder.glob(pattern)):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _held_out(names: Sequence[str], labels: Tensor) -> Tensor:
    """Choose about a fifth for testing by the hash of each file's name, at least one a class.

    An image stays in its split when others are added. Returns bool [N].
    """
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    chosen = torch.tensor([digest[0] < 256 * _TEST_SHARE for digest in digests])
    for label in range(int(labels.max()) + 1):
        members = sorted((labels == label).nonzero().flatten().tolist(), key=digests.__getitem__)
        if len(members) < 2:
            raise DataError(f"{names[members[0]]} is alone in its class: none is left for testing")
        chosen[members[0]], chosen[members[-1]] = True, False
    return chosen


def _listed(root: Path, classes: Sequence[str], found: Found) -> list[tuple[Path, int]]:
    """List the images and their labels."""
    images = []
    for label, name in enumerate(classes):
        files = [path for path in _visible(root / name, "**/*") if path.is_file()]
        own = [(path, label) for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        found.others += len(files) - len(own)
        if not own:
            raise DataError(f"{root / name}: no {', '.join(IMAGE_SUFFIXES)} in it")
        images += own
    return images


@dataclass(frozen=True)
class _Row:
    path: Path
    label: int
    content: Pixels  # pixels [C, H, W], or their digest [32]


@dataclass
class _Reader:
    """Reads a folder's images, into memory if they fit."""

    preprocessing: Preprocessing
    found: Found
    max_bytes: int
    progress: Callable[[int, int], None]
    keeps: bool = True

    def read(self, parts: Sequence[Sequence[tuple[Path, int]]]) -> list[list[_Row]]:
        """Decode the images of each part; of those that do not fit the digests are kept."""
        total = sum(map(len, parts))
        self.keeps = total * math.prod(self.preprocessing.shape) <= self.max_bytes
        read = _in_threads(self._read, (path for part in parts for path, _ in part))
        done = 0
        rows: list[list[_Row]] = []
        for part in parts:
            rows.append([])
            for path, label in part:
                result = next(read)
                done += 1
                self.progress(done, total)
                if isinstance(result, str):
                    self.found.broken.append(f"{path}: {result}")
                else:
                    content, size = result
                    self.found.sizes.add(size)
                    rows[-1].append(_Row(path, label, content))
        return rows

    def split(self, rows: Sequence[_Row]) -> Split:
        """Make a split of rows that were read."""
        content = torch.from_numpy(np.stack([row.content for row in rows]))
        labels = torch.tensor([row.label for row in rows])
        if self.keeps:
            return Split(content, labels)
        return FileSplit([row.path for row in rows], content, labels, self.preprocessing)

    def _read(self, path: Path) -> tuple[Pixels, tuple[int, int]] | str:
        """Return an image's pixels, or their digest, and its size; or why it cannot be read."""
        try:
            pixels, size = _decode(path, self.preprocessing)
        except UnidentifiedImageError:
            return "not a PNG, JPEG or WebP image"
        except Exception as error:  # Pillow's parsers raise anything for a bad file
            return getattr(error, "strerror", None) or str(error)
        if self.keeps:
            return pixels, size
        return np.frombuffer(bytearray(hashlib.sha256(pixels.data).digest()), np.uint8), size


def _decode(path: Path, preprocessing: Preprocessing) -> tuple[Pixels, tuple[int, int]]:
    """Return an image's pixels [C, H, W], and its (height, width) before they were fitted."""
    raw = path.read_bytes()
    if raw[:4] == b"\x89PNG" and raw[24:25] == b"\x10":  # Pillow would clip them
        raise ValueError("16 bits a channel: save it with 8")
    with Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS) as image:
        size = image.height, image.width
        preprocessing.set_scale(image)
        return preprocessing.prepare(image), size


def _in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map in order, at most `_AHEAD` items before they are asked for."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decode") as pool:
        running: deque[Future[R]] = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > _AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def augment(images: Tensor, shift: int, flip: bool) -> Tensor:
    """Shift and mirror images uint8 [B, C, H, W], each on its own, by PyTorch's global generator.

    Each is shifted by at most `shift` pixels up, down, left and right, what comes in is black; with
    `flip`, half of them are mirrored left to right.
    """
    if flip:
        mirrored = torch.rand(len(images)).lt(0.5).to(images.device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    if shift:
        batch, _, height, width = images.shape
        corner = torch.randint(2 * shift + 1, (2, batch, 1)).to(images.device)
        rows = corner[0] + torch.arange(height, device=images.device)  # [B, H]
        columns = corner[1] + torch.arange(width, device=images.device)  # [B, W]
        padded = F.pad(images, (shift,) * 4)
        image = torch.arange(batch, device=images.device).view(-1, 1, 1)
        shifted = padded.permute(0, 2, 3, 1)[image, rows.unsqueeze(2), columns.unsqueeze(1)]
        images = shifted.permute(0, 3, 1, 2)
    return images

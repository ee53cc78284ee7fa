"""States of a disk after a power failure, from a recording of what a program did to a folder.

The folder is compared before and after every call of the operating system, so that no way of
writing is missed; each fsync is noted. A power failure then loses what was not flushed, by a
model that is stricter than any file system:

- A file's bytes last from its fsync on. Before it, the file has its old bytes, its new ones, the
  first half of them, zeros in their place, zeros in place of the second half, or is empty.
- A folder's entries last from the folder's fsync on. Before it, any subset of the changes is there,
  whatever their order was. A rename within a folder is one change.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from pathlib import Path
from typing import NamedTuple

Tree = tuple[tuple[str, "bytes | Tree"], ...]
"""A folder's entries, sorted: names with a file's bytes or a folder's entries."""


class Change(NamedTuple):
    """Entries of a folder that one call changed: the new node by name; None: the name is gone."""

    folder: int
    entries: dict[str, int | None]


class Write(NamedTuple):
    """New bytes of a file."""

    file: int
    data: bytes


class Flush(NamedTuple):
    """An fsync of a file or folder."""

    node: int


class Mark(NamedTuple):
    """What the program said: that something is done, and must last."""

    done: object


class Snapshot(NamedTuple):
    """All folders and files under a root, by node; the root is node 0."""

    folders: dict[int, dict[str, int]]
    files: dict[int, bytes]


def calls_the_system(called: object) -> bool:
    """Say if a function in C is one of `os` or `io`."""
    home = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
    return home in ("posix", "io", "_io")


class Recording:
    """What was done to a folder, in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Change | Write | Flush | Mark] = []
        self.folders: set[int] = set()  # of all nodes, those that are folders
        self._nodes: dict[int, int] = {}  # by inode
        self._made = 0
        self._now = self.start = self._look()

    def mark(self, done: object) -> None:
        """Note that something is done."""
        self.events.append(Mark(done))

    @contextmanager
    def running(self) -> Iterator["Recording"]:
        """Record what this process does in the block."""
        fsync = os.fsync

        def flush(descriptor: int) -> None:
            fsync(descriptor)
            if (node := self._nodes.get(os.fstat(descriptor).st_ino)) is not None:
                self.events.append(Flush(node))

        def hook(_frame: object, event: str, called: object) -> None:
            if event == "c_return" and calls_the_system(called):
                self._compare()

        os.fsync = flush
        sys.setprofile(hook)
        try:
            yield self
        finally:
            sys.setprofile(None)
            os.fsync = fsync

    def _look(self) -> Snapshot:
        found, seen = Snapshot({}, {}), {}

        def look(path: Path) -> int:
            inode = path.lstat().st_ino
            if inode not in self._nodes:
                self._nodes[inode], self._made = self._made, self._made + 1
            node = seen[inode] = self._nodes[inode]
            if path.is_dir():
                found.folders[node] = {}
                found.folders[node] |= {p.name: look(p) for p in sorted(path.iterdir())}
            else:
                found.files[node] = path.read_bytes()
            return node

        look(self.root)
        self.folders |= found.folders.keys()
        self._nodes = seen  # the inode of a removed file may be given to another
        return found

    def _compare(self) -> None:
        before, now = self._now, self._look()
        found: list[Change | Write] = []
        for node, entries in now.folders.items():
            was = before.folders.get(node, {})
            names = [n for n in was.keys() | entries.keys() if was.get(n) != entries.get(n)]
            if names:
                found.append(Change(node, {name: entries.get(name) for name in names}))
        for node, data in now.files.items():
            if data != before.files.get(node, b""):
                found.append(Write(node, data))
        assert len(found) <= 1, f"several changes at once: {found}"
        self.events += found
        self._now = now


@dataclass
class File:
    """A file's bytes: those that last, and those that a program reads."""

    lasting: bytes = b""
    now: bytes = b""

    def possible(self) -> set[bytes]:
        """Return what a power failure can leave."""
        half, size = self.now[: len(self.now) // 2], len(self.now)
        torn = {self.now, half, half.ljust(size, b"\0"), bytes(size), b"", self.lasting}
        return {self.now} if self.now == self.lasting else torn


@dataclass
class Folder:
    """A folder's entries that last, and the changes that may be lost."""

    lasting: dict[str, int] = field(default_factory=dict)
    changes: list[dict[str, int | None]] = field(default_factory=list)

    def with_changes(self, changes: Iterable[dict[str, int | None]]) -> dict[str, int]:
        """Return the entries after some of the changes."""
        entries: dict[str, int | None] = {**self.lasting}
        for change in changes:
            entries |= change
        return {name: node for name, node in entries.items() if node is not None}

    def possible(self) -> list[dict[str, int]]:
        """Return what a power failure can leave."""
        sizes = range(len(self.changes) + 1)
        chosen = chain.from_iterable(combinations(self.changes, size) for size in sizes)
        return [self.with_changes(changes) for changes in chosen]


class Disk:
    """A disk on which a recording is replayed."""

    def __init__(self, recording: Recording) -> None:
        start = recording.start
        self._folders = {node: Folder() for node in recording.folders}
        self._folders |= {node: Folder(dict(found)) for node, found in start.folders.items()}
        self._files = defaultdict(File)
        self._files |= {node: File(data, data) for node, data in start.files.items()}

    def replay(self, event: Change | Write | Flush) -> None:
        """Do once more what was recorded."""
        if isinstance(event, Change):
            self._folders[event.folder].changes.append(event.entries)
        elif isinstance(event, Write):
            self._files[event.file].now = event.data
        elif event.node in self._folders:
            folder = self._folders[event.node]
            folder.lasting, folder.changes = folder.with_changes(folder.changes), []
        else:
            self._files[event.node].lasting = self._files[event.node].now

    def possible(self, node: int = 0) -> "set[bytes] | set[Tree]":
        """Return what a power failure now can leave of a node."""
        if node not in self._folders:
            return self._files[node].possible()
        found = set()
        for entries in self._folders[node].possible():
            names = sorted(entries)
            contents = (self.possible(entries[name]) for name in names)
            found |= {tuple(zip(names, chosen, strict=True)) for chosen in product(*contents)}
        return found


class Failure(NamedTuple):
    """A state after a power failure, and what had been done, and must last."""

    tree: Tree
    done: tuple[object, ...]

    def write(self, root: Path) -> None:
        """Make the state in an empty folder."""
        _write(root, self.tree)


def _write(folder: Path, tree: Tree) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in tree:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            _write(folder / name, content)


def power_failures(recording: Recording) -> list[Failure]:
    """Return every state that a power failure before, between or after the events can leave."""
    disk, done = Disk(recording), ()
    found = dict.fromkeys(Failure(tree, done) for tree in disk.possible())
    for event in recording.events:
        if isinstance(event, Mark):
            done = (*done, event.done)
        else:
            disk.replay(event)
        found |= dict.fromkeys(Failure(tree, done) for tree in disk.possible())
    return list(found)

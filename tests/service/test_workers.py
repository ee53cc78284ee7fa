"""The line where workers wait for each other."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dropserve.service.inference.workers import (
    ControlMessage,
    ControlState,
    StartupBarrier,
    shared_folder,
)


def test_nobody_goes_before_all_have_arrived(tmp_path):
    async def worker(name, seconds, gone):
        line = StartupBarrier(tmp_path, 3)
        await asyncio.sleep(seconds)
        line.arrive(name)
        await line.wait()
        gone.append((name, len(list(tmp_path.iterdir()))))

    async def main():
        gone, delays = [], [("a", 0.2), ("b", 0), ("c", 0.1)]
        async with asyncio.timeout(10):
            await asyncio.gather(*(worker(n, s, gone) for n, s in delays))
        return gone

    assert sorted(asyncio.run(main())) == [("a", 3), ("b", 3), ("c", 3)]


def test_one_that_comes_later_does_not_wait(tmp_path):
    for name in "ab":
        StartupBarrier(tmp_path, 2).arrive(name)
    late = StartupBarrier(tmp_path, 2)
    late.arrive("c")
    asyncio.run(asyncio.wait_for(late.wait(), 1))


def test_the_parent_makes_the_folder_and_wipes_it_out(monkeypatch):
    monkeypatch.delenv("_DROPSERVE_SHARED", raising=False)
    with shared_folder() as folder:
        line = StartupBarrier.of_this_worker(1)
        line.arrive("a")
        asyncio.run(asyncio.wait_for(line.wait(), 1))
        assert ControlState.of_this_worker().read() == ControlMessage()
        assert folder.is_dir()
        assert Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).parent == folder
    assert not folder.exists()
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


@pytest.mark.parametrize("shared", [True, False])
def test_the_latest_notice_is_read_by_all(shared, tmp_path):
    board = ControlState(tmp_path if shared else None)
    other = ControlState(tmp_path) if shared else board
    assert other.read() == ControlMessage()
    board.post("a", loaded=False)
    board.post("b", loaded=False)
    assert board.post("a", loaded=True) == other.read() == ControlMessage(3, frozenset({"b"}))


def test_notices_posted_at_once_by_several_are_all_counted(tmp_path):
    def post(k):
        ControlState(tmp_path).post(f"model {k}", loaded=False)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(post, range(40)))
    assert ControlState(tmp_path).read() == ControlMessage(
        40, frozenset(f"model {k}" for k in range(40))
    )


def test_a_notice_waits_for_those_that_live_and_for_no_others(tmp_path):
    board = ControlState(tmp_path)
    board.obeyed(board.read())
    (tmp_path / f"{2**22 + 1}.done").write_text("0")  # more than any process id: dead
    notice = board.post("a", loaded=False)

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(board.all_obeyed(notice), 0.1)
        board.obeyed(notice)
        await asyncio.wait_for(board.all_obeyed(notice), 1)

    asyncio.run(main())

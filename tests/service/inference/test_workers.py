"""Coordination between workers."""

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
        barrier = StartupBarrier(tmp_path, 3)
        await asyncio.sleep(seconds)
        barrier.ready(name)
        await barrier.wait()
        gone.append((name, len(list(tmp_path.iterdir()))))

    async def main():
        gone, delays = [], [("a", 0.2), ("b", 0), ("c", 0.1)]
        async with asyncio.timeout(10):
            await asyncio.gather(*(worker(n, s, gone) for n, s in delays))
        return gone

    assert sorted(asyncio.run(main())) == [("a", 3), ("b", 3), ("c", 3)]


def test_one_that_comes_later_does_not_wait(tmp_path):
    for name in "ab":
        StartupBarrier(tmp_path, 2).ready(name)
    late = StartupBarrier(tmp_path, 2)
    late.ready("c")
    asyncio.run(asyncio.wait_for(late.wait(), 1))


def test_the_parent_makes_the_folder_and_wipes_it_out(monkeypatch):
    monkeypatch.delenv("_DROPSERVE_SHARED", raising=False)
    with shared_folder() as folder:
        barrier = StartupBarrier.of_this_worker(1)
        barrier.ready("a")
        asyncio.run(asyncio.wait_for(barrier.wait(), 1))
        assert ControlState.of_this_worker().read() == ControlMessage()
        assert folder.is_dir()
        assert Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).parent == folder
    assert not folder.exists()
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


@pytest.mark.parametrize("shared", [True, False])
def test_the_latest_message_is_read_by_all(shared, tmp_path):
    control = ControlState(tmp_path if shared else None)
    other = ControlState(tmp_path) if shared else control
    assert other.read() == ControlMessage()
    control.publish("a", loaded=False)
    control.publish("b", loaded=False)
    assert control.publish("a", loaded=True) == other.read() == ControlMessage(3, frozenset({"b"}))


def test_messages_posted_at_once_by_several_are_all_counted(tmp_path):
    def post(k):
        ControlState(tmp_path).publish(f"model {k}", loaded=False)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(post, range(40)))
    assert ControlState(tmp_path).read() == ControlMessage(
        40, frozenset(f"model {k}" for k in range(40))
    )


def test_a_message_waits_for_those_that_live_and_for_no_others(tmp_path):
    control = ControlState(tmp_path)
    control.acknowledge(control.read())
    (tmp_path / f"{2**22 + 1}.done").write_text("0")  # more than any process id: dead
    message = control.publish("a", loaded=False)

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(control.all_acknowledged(message), 0.1)
        control.acknowledge(message)
        await asyncio.wait_for(control.all_acknowledged(message), 1)

    asyncio.run(main())

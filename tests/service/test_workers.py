"""The line where workers wait for each other."""

import asyncio
import os
from pathlib import Path

from service.workers import StartingLine, starting_line


def test_nobody_goes_before_all_have_arrived(tmp_path):
    async def worker(name, seconds, gone):
        line = StartingLine(tmp_path, 3)
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
        StartingLine(tmp_path, 2).arrive(name)
    late = StartingLine(tmp_path, 2)
    late.arrive("c")
    asyncio.run(asyncio.wait_for(late.wait(), 1))


def test_the_parent_draws_the_line_and_wipes_it_out(monkeypatch):
    monkeypatch.delenv("_DROPSERVE_STARTING", raising=False)
    with starting_line():
        line = StartingLine.of_this_worker(1)
        line.arrive("a")
        asyncio.run(asyncio.wait_for(line.wait(), 1))
        folder = Path(os.environ["_DROPSERVE_STARTING"])
        assert folder.is_dir()
    assert not folder.exists()

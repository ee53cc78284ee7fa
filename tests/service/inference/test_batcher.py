"""The batcher alone: a thread to run on, and no network."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.service.inference import batcher as batching
from dropserve.service.inference.batcher import Batcher, QueueFull, QueueTimeout, WaitTooLong


class Pause:
    """Holds the runner once it has reached an item."""

    def __init__(self):
        self.reached, self.over = threading.Event(), threading.Event()

    async def wait_until_reached(self):
        assert await asyncio.to_thread(self.reached.wait, 10)


class Runner:
    """Answers (key, item), and remembers the batches; key "slow 3" yields three times.

    Attributes:
        batches: (key, items) of each run, in the order of their start.
        steps: the key of each step, in order; "closed" where a run was closed on the executor.
    """

    def __init__(self):
        self.batches = []
        self.steps = []
        self.threads = []
        self.pauses = {}

    def pause_at(self, item):
        self.pauses[item] = Pause()
        return self.pauses[item]

    def __call__(self, key, items):
        self.batches.append((key, list(items)))
        self.steps.append(key)
        self.threads.append(threading.current_thread())
        self._step(items)
        try:
            for _ in range(int(key.partition(" ")[2] or 0)):
                yield
                self.steps.append(key)
        except GeneratorExit:
            here = threading.current_thread() is threading.main_thread()
            self.steps.append("dropped" if here else "closed")
            raise
        return [(key, item) for item in items if item != "short"]

    def _step(self, items):
        for pause in [self.pauses.pop(item) for item in items if item in self.pauses]:
            pause.reached.set()
            assert pause.over.wait(10)
        if "poison" in items:
            raise ValueError("poison")
        if "stop" in items:
            raise StopIteration


def run(scenario, **limits):
    """Run `scenario(batcher, runner)` in an event loop; return the batches."""
    return run_steps(scenario, **limits).batches


def run_steps(scenario, **limits):
    """Run `scenario(batcher, runner)` in an event loop; return the runner. No callback fails."""
    runner, limits = Runner(), {"max_batch": 8, "max_queue": 100, "max_jobs": 16} | limits
    errors = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _loop, error: errors.append(error))
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(runner, executor, **limits)
            async with asyncio.timeout(20):
                await scenario(batcher, runner)
                while batcher._busy:  # noqa: ASYNC110  it comes to rest
                    await asyncio.sleep(0)

    asyncio.run(main())
    assert [error for error in errors if "handle" in error] == []  # those of callbacks
    return runner


@asynccontextmanager
async def busy(batcher, runner):
    """Hold the runner in a first batch; let it go at the end, and wait for it."""
    pause = runner.pause_at("first")
    first = asyncio.create_task(batcher.submit("a", "first"))
    await pause.wait_until_reached()
    yield
    pause.over.set()
    assert await first == ("a", "first")


async def queued(*submissions):
    """Start submissions in order and let each get into the queue."""
    tasks = [asyncio.create_task(submission) for submission in submissions]
    await asyncio.sleep(0)
    return tasks


def test_an_idle_runner_gets_an_item_at_once_and_alone():
    async def scenario(batcher, _runner):
        assert await batcher.submit("a", 1) == ("a", 1)
        assert await batcher.submit("a", 2) == ("a", 2)

    assert run(scenario) == [("a", [1]), ("a", [2])]


def test_what_arrives_while_a_batch_runs_is_the_next_batch():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            tasks = await queued(*(batcher.submit("a", i) for i in range(5)))
        assert await asyncio.gather(*tasks) == [("a", i) for i in range(5)]

    assert run(scenario) == [("a", ["first"]), ("a", [0, 1, 2, 3, 4])]


def test_a_batch_is_at_most_max_batch_heavy_and_a_heavier_item_runs_alone():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            weights = [3, 4, 2, 50, 1, 8, 7, 1]
            tasks = await queued(*(batcher.submit("a", w, w) for w in weights))
        await asyncio.gather(*tasks)

    batches = run(scenario)[1:]
    assert [items for _, items in batches] == [[3, 4], [2], [50], [1], [8], [7, 1]]


def test_a_full_queue_refuses_at_once_and_takes_again_when_there_is_room():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            tasks = await queued(batcher.submit("a", 1, 3))
            with pytest.raises(QueueFull):
                await batcher.submit("a", 2, 2)
            tasks += await queued(batcher.submit("a", 3, 1))
        await asyncio.gather(*tasks)
        assert await batcher.submit("a", 4, 4) == ("a", 4)

    assert run(scenario, max_queue=4) == [("a", ["first"]), ("a", [1, 3]), ("a", [4])]


def test_what_has_not_begun_within_its_time_never_does():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            late, patient = await queued(
                batcher.submit("a", "late", 5, max_wait=0.01), batcher.submit("a", 2, max_wait=20)
            )
            with pytest.raises(QueueTimeout):
                await late
            assert batcher.queued == 1
        assert await patient == ("a", 2)

    assert run(scenario) == [("a", ["first"]), ("a", [2])]


def test_what_has_begun_within_its_time_takes_as_long_as_it_takes():
    async def scenario(batcher, runner):
        pause = runner.pause_at(1)
        (begun,) = await queued(batcher.submit("a", 1, max_wait=0.05))
        await pause.wait_until_reached()
        await asyncio.sleep(0.1)
        pause.over.set()
        assert await begun == ("a", 1)

    assert run(scenario) == [("a", [1])]


def test_what_weighs_nothing_is_taken_however_much_waits():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            tasks = await queued(batcher.submit("a", 1, 99), batcher.submit("b", 2, 0))
        assert await asyncio.gather(*tasks) == [("a", 1), ("b", 2)]

    run(scenario, max_queue=4)


def test_a_cancelled_item_that_waits_is_never_computed_and_frees_its_place():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            gone, stays = await queued(batcher.submit("a", "gone", 3), batcher.submit("b", 1, 1))
            gone.cancel()
            await asyncio.sleep(0)
            (late,) = await queued(batcher.submit("b", 2, 3))
        assert await stays == ("b", 1)
        assert await late == ("b", 2)
        assert gone.cancelled()

    assert run(scenario, max_queue=4) == [("a", ["first"]), ("b", [1, 2])]


@pytest.mark.parametrize("last", [2, "poison"])
def test_an_item_cancelled_while_it_runs_disturbs_no_other(last):
    async def scenario(batcher, runner):
        pause = runner.pause_at(1)
        async with busy(batcher, runner):
            tasks = await queued(*(batcher.submit("a", item) for item in (0, 1, last)))
        await pause.wait_until_reached()
        tasks[1].cancel()
        await asyncio.sleep(0)
        pause.over.set()
        first, gone, third = await asyncio.gather(*tasks, return_exceptions=True)
        assert first == ("a", 0)
        assert isinstance(gone, asyncio.CancelledError)
        assert third == ("a", 2) if last == 2 else isinstance(third, ValueError)
        assert await batcher.submit("a", 9) == ("a", 9)

    run(scenario)


@pytest.mark.parametrize(
    ("bad", "error"), [("poison", ValueError), ("short", RuntimeError), ("stop", RuntimeError)]
)
def test_one_bad_item_fails_alone_and_nothing_hangs(bad, error):
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            tasks = await queued(*(batcher.submit("a", item) for item in (1, bad, 3)))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[0] == ("a", 1)
        assert results[2] == ("a", 3)
        assert type(results[1]) is error
        with pytest.raises(error):
            await batcher.submit("a", bad)
        assert await batcher.submit("a", 4) == ("a", 4)

    run(scenario)


def test_a_step_that_exits_fails_its_items_and_the_next_batch_runs():
    async def main():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(exits, executor, max_batch=8, max_queue=8)
            with pytest.raises(RuntimeError, match="SystemExit"):
                await asyncio.wait_for(batcher.submit("k", "leave"), 5)
            return await asyncio.wait_for(batcher.submit("k", "stay"), 5)

    assert asyncio.run(main()) == "stay"


def exits(_key, items):
    yield from ()
    if "leave" in items:
        raise SystemExit
    return items


def test_keys_never_share_a_batch_and_take_turns():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            many = await queued(*(batcher.submit("a", i) for i in range(6)))
            few = await queued(batcher.submit("b", 0), batcher.submit("c", 0))
        await asyncio.gather(*many, *few)

    keys = [key for key, _ in run(scenario, max_batch=2)]
    assert keys == ["a", "a", "b", "c", "a", "a"]


def test_jobs_that_yield_take_turns_with_each_other_and_with_keys_that_start():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            tasks = await queued(*(batcher.submit(k, 1) for k in ("x 2", "y 2", "b", "c", "d")))
        assert await asyncio.gather(*tasks) == [(k, 1) for k in ("x 2", "y 2", "b", "c", "d")]

    steps = run_steps(scenario, classify=lambda key: (key, 1)).steps  # nobody knows what they cost
    assert steps == ["a", "x 2", "x 2", "y 2", "x 2", "b", "y 2", "c", "y 2", "d"]


def test_an_urgent_item_waits_for_one_step_of_another():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            slow = await queued(*(batcher.submit(f"{k} 3", 1) for k in "xyz"))
            quick = await queued(*(batcher.submit(k, 1, 8, urgent=True) for k in "uvuv"))
        await asyncio.gather(*slow, *quick)

    steps = run_steps(scenario).steps
    turns = [i for i, key in enumerate(steps) if key in "uv"]
    assert [steps[i] for i in turns] == ["u", "v", "u", "v"]
    assert np.diff([0, *turns]).max() <= 2


def test_urgent_items_without_end_leave_every_other_turn_to_the_rest():
    async def scenario(batcher, _runner):
        async def keep_asking():
            while True:
                await asyncio.gather(*(batcher.submit(k, 1, urgent=True) for k in "uvw"))

        asking = asyncio.create_task(keep_asking())
        assert await batcher.submit("x 50", 1) == ("x 50", 1)
        asking.cancel()

    steps = run_steps(scenario).steps
    first = steps.index("x 50")
    assert steps[first : steps.index("x 50", first + 1)].count("u") <= 1
    assert len(steps) < 160


def test_a_job_that_all_have_left_is_closed_where_it_ran():
    async def scenario(batcher, runner):
        pause = runner.pause_at("gone")
        tasks = await queued(batcher.submit("x 9", "gone"), batcher.submit("x 9", "too"))
        await pause.wait_until_reached()
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        (stays,) = await queued(batcher.submit("b 1", 1))
        pause.over.set()
        assert await stays == ("b 1", 1)
        assert await batcher.submit("c", 1) == ("c", 1)

    steps = run_steps(scenario).steps
    assert sorted(steps) == ["b 1", "b 1", "c", "closed", "x 9"]


def test_a_job_that_all_leave_between_its_steps_is_closed_on_the_executor():
    async def scenario(batcher, runner):
        (task,) = await queued(batcher.submit("x 9", 1))
        pause = runner.pause_at("stop here")
        (other,) = await queued(batcher.submit("b", "stop here"))
        await pause.wait_until_reached()
        task.cancel()
        await asyncio.sleep(0)
        pause.over.set()
        assert await other == ("b", "stop here")
        assert await batcher.submit("c", 1) == ("c", 1)

    steps = run_steps(scenario).steps
    assert steps[steps.index("b") + 1 :].count("x 9") == 0
    assert steps.count("closed") == 1


def test_a_job_that_one_of_two_leaves_goes_on_for_the_other():
    async def scenario(batcher, runner):
        pause = runner.pause_at("gone")
        leaves, stays = await queued(batcher.submit("x 3", "gone"), batcher.submit("x 3", 2))
        await pause.wait_until_reached()
        leaves.cancel()
        pause.over.set()
        assert await stays == ("x 3", 2)

    assert run_steps(scenario).steps == ["x 3"] * 4


def test_the_jobs_under_way_are_limited_and_urgent_ones_pass():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            slow = await queued(*(batcher.submit(f"{k} 5", 1) for k in "xyz"))
            (quick,) = await queued(batcher.submit("u", 1, urgent=True))
        await asyncio.gather(*slow, quick)

    steps = run_steps(scenario, max_jobs=2).steps
    assert steps.index("u") <= 2
    assert steps.index("z 5") > min(i for i, k in enumerate(steps) if steps[: i + 1].count(k) == 6)


def test_inline_batches_run_on_the_event_loop_and_only_while_nothing_else_runs():
    async def scenario(batcher, runner):
        assert await batcher.submit("inline", 1) == ("inline", 1)
        async with busy(batcher, runner):  # "a" is not inline
            tasks = await queued(*(batcher.submit("inline", n) for n in range(12)))
            await asyncio.sleep(0.05)
            assert len(runner.batches) == 2
        assert await asyncio.gather(*tasks) == [("inline", n) for n in range(12)]
        assert await batcher.submit("inline 2", 1) == ("inline 2", 1)
        assert await batcher.submit("inline", "heavy", 5) == ("inline", "heavy")
        bad = await queued(batcher.submit("inline", "poison"), batcher.submit("inline", 3))
        results = await asyncio.gather(*bad, return_exceptions=True)
        assert isinstance(results[0], ValueError)
        assert results[1] == ("inline", 3)

    asked = []

    def inline(key, weight):
        asked.append((key, weight))
        return key.startswith("inline") and weight <= 4

    runner = run_steps(scenario, max_batch=4, inline=inline)
    main = threading.main_thread()
    for (key, items), thread in zip(runner.batches, runner.threads, strict=True):
        assert (thread is main) == (key != "a" and items != ["heavy"])
    assert [items for key, items in runner.batches[2:5]] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert asked.count(("inline 2", 1)) == 3  # of each step


def test_an_entry_may_be_cancelled_before_during_and_after_its_run():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            before, stays = batcher.queue("a", 1), batcher.queue("a", 2, 3)
            assert batcher.queued == 4
            batcher.cancel(before)
            assert batcher.queued == 3
            batcher.cancel(before)
            assert batcher.queued == 3
        assert await stays.future == ("a", 2)
        pause = runner.pause_at("during")
        during = batcher.queue("a", "during")
        await pause.wait_until_reached()
        batcher.cancel(during)
        pause.over.set()
        after = batcher.queue("a", 4)
        assert await after.future == ("a", 4)
        batcher.cancel(after)
        assert before.future.cancelled()
        assert during.future.cancelled()
        assert batcher.queued == 0
        batcher.close()
        with pytest.raises(RuntimeError, match="closed"):
            batcher.queue("a", 5)
        assert batcher.queued == 0

    batches = run(scenario)
    assert batches == [("a", ["first"]), ("a", [2]), ("a", ["during"]), ("a", [4])]


def test_who_is_answered_and_asks_again_at_once_comes_along_with_the_next():
    async def scenario(batcher, runner):
        async def ask(name):
            for n in range(3):
                await batcher.submit("a", (name, n))

        async with busy(batcher, runner):
            tasks = await queued(*(ask(name) for name in "xy"))
            late = asyncio.create_task(ask("z"))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, late)

    assert [len(items) for _, items in run(scenario)] == [1, 3, 3, 3]


def test_what_is_closed_starts_nothing_more_and_keeps_nothing_that_began():
    async def scenario(batcher, runner):
        (begun,) = await queued(batcher.submit("x 9", 1))
        async with busy(batcher, runner):
            (waits,) = await queued(batcher.submit("a", 1))
            batcher.close()
            assert runner.steps[-1] == "dropped"
        for task in (begun, waits):
            task.cancel()
        assert await asyncio.gather(begun, waits, return_exceptions=True) == [ANY, ANY]
        assert begun.cancelled()
        assert waits.cancelled()
        assert batcher.queued == 0

    assert run(scenario) == [("x 9", [1]), ("a", ["first"])]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b 1", "c 3"]),  # key
        st.sampled_from(["good", "good", "good", "poison", "short"]),
        st.integers(1, 6),  # weight
        st.sampled_from(["wait", "wait", "cancel now", "cancel later"]),
        st.integers(0, 3),  # turns of the loop before the next
        st.booleans(),  # urgent
    ),
    max_size=25,
)


async def submit_and_check(batcher, number, action):
    key, kind, weight, *_, urgent = action
    item = number if kind == "good" else kind
    if kind == "good":
        assert await batcher.submit(key, item, weight, urgent=urgent) == (key, item)
    else:
        with pytest.raises((ValueError, RuntimeError)):
            await batcher.submit(key, item, weight, urgent=urgent)


async def start(batcher, actions):
    """Submit, wait and cancel as the actions say; return the tasks."""
    tasks = []
    for number, action in enumerate(actions):
        *_, fate, turns, _ = action
        tasks.append(asyncio.create_task(submit_and_check(batcher, number, action)))
        for _ in range(turns):
            await asyncio.sleep(0)
        if fate == "cancel now":
            tasks[-1].cancel()
        elif fate == "cancel later":
            asyncio.get_running_loop().call_later(0.001, tasks[-1].cancel)
    return tasks


@settings(max_examples=100, deadline=None)
@given(actions=ACTIONS)
def test_every_item_gets_its_own_result_whatever_the_interleaving(actions):
    async def scenario(batcher, _runner):
        tasks = await start(batcher, actions)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result, (*_, fate, _, _) in zip(results, actions, strict=True):
            allowed = type(None) if fate == "wait" else (type(None), asyncio.CancelledError)
            assert isinstance(result, allowed), result
        assert await batcher.submit("z", "last") == ("z", "last")
        await asyncio.sleep(0.01)
        assert (batcher.queued, batcher.expected_wait(), batcher._left) == (0, 0, 0)
        for line in (batcher._urgent, batcher._others):
            assert [cost.queued for cost in line._costs.values()] == [0] * len(line._costs)

    for key, items in run(scenario, max_batch=7, max_queue=10_000):
        assert all(actions[item][0] == key for item in items if isinstance(item, int))


class Simulation:
    """A batcher on a clock of its own: batches take what `cost` says, and items arrive meanwhile.

    Attributes:
        now: the time in seconds.
        accepted: for each item that was queued: when, the expected wait, and its future.
        started: when an item's batch started.
        refused: when items were.
    """

    def __init__(self, monkeypatch, cost, max_wait, **limits):
        self.now, self.accepted, self.started, self.refused = 0.0, {}, {}, []
        self._cost, self._max_wait, self._limits = cost, max_wait, limits
        monkeypatch.setattr(batching, "perf_counter", lambda: self.now)

    def run(self, key, items):
        self.started |= dict.fromkeys(items, self.now)
        for seconds in self._cost(key, len(items)):
            self.now += seconds
            yield
        return items

    async def play(self, arrivals):
        """Queue (time, key, urgent) as time comes; answer the rest."""
        limits = {"max_batch": 64, "max_queue": 10**6} | self._limits
        batcher = Batcher(self.run, None, inline=lambda *_: True, **limits)
        for item, (time, key, urgent) in enumerate(arrivals):
            while self.now < time:
                if not batcher._busy:
                    self.now = time
                await asyncio.sleep(0)
            expected = batcher.expected_wait(urgent=urgent)
            try:
                entry = batcher.queue(key, item, urgent=urgent, max_wait=self._max_wait)
            except WaitTooLong:
                self.refused.append(self.now)
            else:
                self.accepted[item] = self.now, expected, entry.future
        await asyncio.gather(*(f for *_, f in self.accepted.values()), return_exceptions=True)
        return batcher

    def waits(self):
        """Return the expected and the real waits of those that were accepted and computed."""
        computed = [(n, t, e) for n, (t, e, _) in self.accepted.items() if n in self.started]
        return np.array([(e, self.started[n] - t) for n, t, e in computed]).T


def test_under_overload_the_wait_is_bounded_and_every_batch_is_useful(monkeypatch):
    """Four times as much as fits: what is accepted starts in time, and the thread never rests."""
    simulation = Simulation(monkeypatch, lambda _key, n: [0.002 + 0.01 * n], max_wait=2.0)
    times = np.arange(0, 30, 1 / 400)  # and 100 a second fit
    asyncio.run(simulation.play([(t, "a", False) for t in times]))
    expected, real = simulation.waits()
    steady = real[len(real) // 5 :]
    assert steady.max() < 2.0 + 0.02
    assert np.median(steady) > 1.0  # the queue is not emptied by refusing too much
    expired = len(simulation.accepted) - len(simulation.started)
    assert expired < 0.02 * len(simulation.accepted)
    assert len(simulation.started) > 0.95 * 100 * 30
    assert np.median(np.abs(expected - real) / np.maximum(real, 0.1)) < 0.4


def test_what_is_urgent_is_expected_to_wait_for_less(monkeypatch):
    """Long jobs of 50 steps fill the queue; what is urgent waits for two of their steps at most."""

    def cost(key, n):
        return [0.001 * n] if key == "urgent" else [0.02] * 50

    simulation = Simulation(monkeypatch, cost, max_wait=5.0, max_batch=1)
    arrivals = [(t, f"long {t}", False) for t in np.arange(0, 20, 0.5)]
    arrivals += [(t + 0.013, "urgent", True) for t in np.arange(5, 20, 0.1)]
    asyncio.run(simulation.play(sorted(arrivals)))
    urgent = {n: e for n, (_, e, _) in simulation.accepted.items() if sorted(arrivals)[n][2]}
    assert len(urgent) == 150
    assert max(urgent.values()) < 0.1
    assert len(simulation.refused) > 5  # long ones, of which half fit


def test_an_idle_batcher_never_refuses_and_a_busy_one_does_at_once(monkeypatch):
    simulation = Simulation(monkeypatch, lambda _key, _n: [1.0] * 10, max_wait=1.5)
    times = [0, 20, 21, 28.5, 50, 50]  # the last two make a batch
    batcher = asyncio.run(simulation.play([(t, "a", False) for t in times]))
    assert simulation.started == {0: 0, 1: 20, 3: 30, 4: 50, 5: 50}
    assert simulation.refused == [21]
    assert batcher.expected_wait() == 0


def test_of_equal_jobs_one_ends_before_the_next_starts_and_a_short_one_does_not_wait(monkeypatch):
    def cost(key, _n):
        return [1.0] if key == "short" else [1.0] * 10

    limits = {"classify": lambda key: (key == "short", 1)}
    simulation = Simulation(monkeypatch, cost, max_wait=100, **limits)
    arrivals = [(0, "a"), (20, "short"), (30, "b"), (31, "c"), (41.5, "short"), (42, "d")]
    asyncio.run(simulation.play([(time, key, False) for time, key in arrivals]))
    assert simulation.started == {0: 0, 1: 20, 2: 30, 3: 40, 4: 42, 5: 51}


def test_what_takes_longer_than_it_should_is_expected_to_be_late_again(monkeypatch):
    def cost(key, _n):
        return [1.0] * (1 if key == "a" else 10)

    simulation = Simulation(monkeypatch, cost, max_wait=100)
    asyncio.run(simulation.play([(0, "a", False), (5, "b", False), (12, "c", False)]))
    _, expected, _ = simulation.accepted[2]
    assert expected == 6  # what takes one second has taken seven


def test_who_would_join_the_last_batch_is_not_expected_to_wait_for_it(monkeypatch):
    """Batches have four different items here: of ten that wait, the last two are one."""

    def fits(_key):
        items = set()
        return lambda item: items.add(item) or len(items) <= 4

    simulation = Simulation(monkeypatch, lambda _key, n: [float(n)], max_wait=100, fits=fits)
    times = [0, 5, *[5.5] * 11]  # the first shows what one costs, the second runs meanwhile
    asyncio.run(simulation.play([(time, "a", False) for time in times]))
    assert simulation.accepted[12][1] == 8
    assert simulation.started[12] == 6 + 8


def test_the_costs_of_few_classes_are_kept():
    classes = [(f"class {n}", 1) for n in range(1000)]

    async def scenario(batcher, _runner):
        for n in range(1000):
            await batcher.submit("a", n)
        assert len(batcher._others._costs) <= 256

    run(scenario, classify=lambda _key: classes.pop())


def test_one_bad_item_of_many_is_found_by_halves():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            items = ["poison" if n == 37 else n for n in range(64)]
            tasks = await queued(*(batcher.submit("a", item) for item in items))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results.pop(37), ValueError)
        assert results == [("a", n) for n in range(64) if n != 37]

    batches = run(scenario, max_batch=64)[1:]
    assert len(batches) == 1 + 2 * 6
    assert sorted({len(items) for _, items in batches}) == [1, 2, 4, 8, 16, 32, 64]


def test_memory_of_a_failed_batch_is_free_before_its_halves_run():
    held, most = [], []

    class Tensor:
        pass

    def runs(_key, items):
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        most.append(sum(each() is not None for each in held))
        yield
        if "poison" in items:
            raise MemoryError
        return items

    async def main(executor):
        batcher = Batcher(runs, executor, max_batch=8, max_queue=8)
        tasks = await queued(*(batcher.submit("a", n) for n in (1, 2, "poison", 4)))
        return await asyncio.gather(*tasks, return_exceptions=True)

    gc.disable()
    try:
        with ThreadPoolExecutor(1) as executor:
            *good, bad, last = asyncio.run(main(executor))
    finally:
        gc.enable()
    assert (good, last) == ([1, 2], 4)
    assert isinstance(bad, MemoryError)
    assert max(most) <= 2  # the two halves are under way at once


def test_cancelled_items_leave_nothing_behind_in_the_queue():
    async def scenario(batcher, runner):
        async with busy(batcher, runner):
            entries = [batcher.queue("a", n, urgent=n % 2 == 0) for n in range(2000)]
            for entry in entries:
                batcher.cancel(entry)
            assert batcher.queued == 0
            assert not batcher._urgent.queues
            assert not batcher._others.queues
            assert batcher._others.seconds == pytest.approx(0, abs=1e-9)

    assert run(scenario, max_queue=5000) == [("a", ["first"])]

"""What decoding takes of memory: each picture no more than it is counted with, all of them no more
than there is room for."""

import asyncio
import gc
import json
import multiprocessing
import re
import threading
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench import bombs
from dropserve.models.memory import release_freed_memory
from dropserve.models.preprocessing import Preprocessing
from dropserve.service.errors import InvalidRequest
from dropserve.service.http.body import json_memory, load_json
from dropserve.service.http.images import ImageSource, encoded, prepared
from dropserve.service.inference.decoder import _SMALL, Decoder, finish
from dropserve.service.settings import Settings
from tests.helpers import encode

MB = 2**20


class Body(bytearray):
    """One that a test can see go."""


class Meter:
    """Adds up what steps that run take."""

    def __init__(self):
        self.lock = threading.Lock()
        self.now = self.most = self.running = self.most_running = 0
        self.order = []

    def steps(self, *memories, name=None, seconds=0.0):
        for memory in memories:
            yield memory
            with self.lock:
                self.order.append(name)
                self.now += memory
                self.running += 1
                self.most = max(self.most, self.now)
                self.most_running = max(self.most_running, self.running)
            time.sleep(seconds)
            with self.lock:
                self.now -= memory
                self.running -= 1
        return name


def run(decoder, *works):
    async def main():
        async with asyncio.timeout(20):
            return await asyncio.gather(*map(decoder.run, works), return_exceptions=True)

    try:
        return asyncio.run(main())
    finally:
        decoder.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 150), max_size=4), max_size=8), st.integers(1, 3))
def test_steps_that_run_take_no_more_than_the_room_and_all_of_them_end(works, threads):
    meter = Meter()
    decoder = Decoder(threads, 100 * MB, list)
    named = [
        meter.steps(*(m * MB for m in memories), name=n, seconds=0.0003)
        for n, memories in enumerate(works)
    ]
    assert run(decoder, *named) == list(range(len(works)))
    alone = max((m for memories in works for m in memories), default=0) * MB
    assert meter.most <= max(100 * MB, alone) + (threads + 1) * _SMALL
    assert decoder._free == 100 * MB


def test_large_steps_wait_for_room_and_smaller_ones_overtake_them():
    meter = Meter()
    decoder = Decoder(2, 100 * MB, list)
    works = [("first", 80), ("large", 90), ("middling", 17), ("small", 1)]
    run(decoder, *(meter.steps(m * MB, name=n, seconds=0.1) for n, m in works))
    assert set(meter.order[:3]) == {"first", "middling", "small"}
    assert meter.order[3] == "large"


def test_a_large_step_is_overtaken_by_one_smaller_one_at_a_time():
    meter = Meter()
    many = [meter.steps(*[20 * MB] * 8, name="many", seconds=0.01) for _ in range(3)]
    large = [meter.steps(90 * MB, name="large") for _ in range(2)]
    run(Decoder(1, 100 * MB, list), *many, *large)
    first, second = [turn for turn, name in enumerate(meter.order) if name == "large"]
    assert 2 <= first < second < 12  # of 26: each second turn is that of who has waited longest


def test_one_thread_is_left_for_small_steps():
    meter = Meter()
    large = [meter.steps(20 * MB, seconds=0.3) for _ in range(4)]
    run(Decoder(2, 100 * MB, list), *large, *(meter.steps(MB, seconds=0.3) for _ in range(4)))
    assert meter.most_running == 3


def test_of_one_request_the_next_picture_waits_behind_those_of_others():
    meter = Meter()
    run(
        Decoder(1, 100 * MB, list),
        meter.steps(*[60 * MB] * 3, name="many", seconds=0.02),
        meter.steps(60 * MB, name="one"),
    )
    assert meter.order == ["many", "one", "many", "many"]


def test_freed_memory_is_given_back_before_the_largest_steps_and_a_second_after_large_ones():
    released, meter = [], Meter()

    async def main():
        decoder = Decoder(1, 100 * MB, lambda: released.append(len(meter.order)))
        await decoder.run(meter.steps(10 * MB))
        assert decoder._timer is None
        await decoder.run(meter.steps(10 * MB, 50 * MB, 51 * MB, 20 * MB))
        assert released == [3]
        await asyncio.sleep(1.5)
        assert released == [3, 5]
        decoder.close()

    asyncio.run(main())


@pytest.mark.parametrize("error", [InvalidRequest("damaged"), MemoryError()], ids=repr)
def test_an_error_ends_the_work_and_gives_its_room_back(error):
    def failing():
        yield 90 * MB
        raise error

    meter = Meter()
    decoder = Decoder(2, 100 * MB, list)
    assert run(decoder, failing(), meter.steps(90 * MB, name="next")) == [error, "next"]
    assert decoder._free == 100 * MB


def test_who_leaves_while_it_waits_leaves_no_body_behind_and_takes_no_room():
    gate = threading.Event()
    decoder = Decoder(1, 100 * MB, list)

    def busy():
        yield 90 * MB
        gate.wait(10)

    def reading(body, memory):
        yield memory
        return bytes(body)

    async def main():
        first = asyncio.create_task(decoder.run(busy()))
        await asyncio.sleep(0.05)
        for memory in (0, 90 * MB):
            body = Body()
            left = weakref.ref(body)
            leaves = asyncio.create_task(decoder.run(reading(body, memory)))
            del body
            await asyncio.sleep(0.01)
            leaves.cancel()
            await asyncio.wait([leaves])
            del leaves
            gc.collect()
            assert left() is None
        first.cancel()
        await asyncio.sleep(0.01)
        assert decoder._free == 10 * MB  # its step is still under way
        gate.set()
        assert await decoder.run(Meter().steps(90 * MB, name="next")) == "next"
        assert decoder._free == 100 * MB

    asyncio.run(main())
    decoder.close()


def test_who_leaves_as_room_is_found_gives_it_back():
    async def main():
        decoder = Decoder(1, 100 * MB, list)
        await decoder._reserve(90 * MB)
        before, after = (asyncio.create_task(decoder._reserve(80 * MB)) for _ in range(2))
        await asyncio.sleep(0)
        before.cancel()
        decoder._return_to_budget(90 * MB)
        after.cancel()
        assert decoder._free == 20 * MB
        await asyncio.wait([before, after])
        assert before.cancelled()
        assert after.cancelled()
        assert decoder._free == 100 * MB
        assert await decoder.run(Meter().steps(90 * MB, name="next")) == "next"
        decoder.close()

    asyncio.run(main())


def test_a_picture_is_let_go_of_before_the_next_is_decoded():
    alive = []

    def decode(_set_scale):
        assert not any(left() for left in alive)
        image = Image.new("L", (1, 1))
        alive.append(weakref.ref(image))
        return image

    how = SimpleNamespace(set_scale=None, prepare=lambda image: np.uint8([[[image.width]]]))
    pixels = finish(prepared([ImageSource(decode, 1)] * 3, SimpleNamespace(preprocessing=how)))
    assert pixels.shape == (3, 1, 1, 1)
    assert len(alive) == 3


def memory(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+)", status, re.MULTILINE)[1])


TURNED = Image.Exif()
TURNED[0x0112] = 6
WHOLE = {"progressive": True, "subsampling": 0}
KINDS = [
    *(("PNG", "RGBA", {}), ("PNG", "LA", {}), ("PNG", "P", {"transparency": 0})),
    *(("PNG", "RGB", {"exif": TURNED}), ("JPEG", "RGB", {"exif": TURNED, **WHOLE})),
    *(("JPEG", "CMYK", WHOLE), ("JPEG", "L", {}), ("WEBP", "RGB", {"method": 0})),
    ("WEBP", "RGBA", {"lossless": True, "quality": 0, "method": 0}),
]


def image(size, kind, mode, options):
    return encode(Image.new(mode, size), kind, **options)


def taken(data, channels):
    """Return the bytes that reading an image takes, and those it is counted with."""
    into = Preprocessing((32, 32), channels, (0.5,) * channels, (0.5,) * channels)
    picture = encoded(data, None, Settings(max_pixels=10**7, max_side=2000))
    with suppress(InvalidRequest):
        into.prepare(picture.decode(into.set_scale))
    release_freed_memory()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    with suppress(InvalidRequest):
        into.prepare(picture.decode(into.set_scale))
    return memory("VmHWM") - before, picture.memory


def taken_by_json(text):
    body = json.dumps({"images": [text]}, ensure_ascii=False).encode()
    load_json(body)
    release_freed_memory()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    load_json(body)
    return memory("VmHWM") - before, json_memory(body)


@pytest.fixture(scope="module")
def fresh():
    """A process of its own: this one's heap has holes from other tests."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


def test_no_image_takes_more_memory_than_it_is_counted_with(fresh):
    images = {kind[:2]: image((2000, 1500), *kind) for kind in KINDS}
    for name, data in images.items():
        for channels in (1, 3):
            bytes_taken, counted = fresh.submit(taken, data, channels).result()
            # what else the process does meanwhile takes some, too
            assert 3_000_000 < bytes_taken < counted + 4_000_000, (name, channels)


@pytest.mark.parametrize(
    "data",
    [
        bombs.png_of_exif(3_000_000),
        bombs.webp_of_tables(256),
        bombs.png_of_text(20),
        bombs.jpeg_of_scans(1000, 90),
    ],
    ids=["EXIF", "tables", "text", "scans"],
)
def test_nor_does_one_that_is_made_to(data, fresh):
    bytes_taken, counted = fresh.submit(taken, data, 1).result()
    assert bytes_taken < counted + 4_000_000


@pytest.mark.parametrize("text", ["A" * 9_000_000, "\U0001f600" + "A" * 9_000_000])
def test_nor_does_json(text, fresh):
    bytes_taken, counted = fresh.submit(taken_by_json, text).result()
    assert bytes_taken < counted + 4_000_000


def test_a_jpeg_of_very_many_scans_is_refused():
    with pytest.raises(InvalidRequest, match="more than 100 scans"):
        encoded(bombs.jpeg_of_scans(64, 100), None, Settings(max_pixels=10**7, max_side=2000))


def photo(size, **options):
    noise = Image.effect_noise((60, 40), 90).resize(size).convert("RGB")
    return encode(noise, "JPEG", **options)


def test_photos_of_a_phone_are_read_and_two_in_one_request(http):
    twelve, large = photo((4000, 3000), quality=20), photo((8000, 6000), quality=5)
    headers = {"Content-Type": "image/jpeg"}
    assert http.post("/predict", content=large, headers=headers).status_code == 200
    both = http.post("/predict", files=[("file", ("a.jpg", twelve)), ("file", ("b.jpg", twelve))])
    assert len(both.json()["predictions"]) == 2
    assert Settings().max_body_bytes == 32 * MB


def test_who_sends_too_much_learns_which_setting_says_so(http, problem):
    wide = http.post("/predict", json={"instances": [[[1] * 20_000]]})
    assert "DROPSERVE_MAX_SIDE" in problem(wide, 413)
    body = http.post("/predict", content=bytes(2 * MB), headers={"Content-Type": "image/png"})
    assert "DROPSERVE_MAX_BODY_BYTES" in problem(body, 413)

"""Damaged images and damaged HTTP, each made from its number alone."""

import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from tests.helpers import PNG, encode, noise
from tests.reliability.messages import get, head, request

MODES = {"PNG": ["L", "RGB", "RGBA", "P", "1", "LA"], "JPEG": ["L", "RGB", "CMYK"], "WEBP": ["RGB"]}
SIZES = [(1, 1), (8, 8), (17, 5), (40, 30), (160, 120)]
SOUND = [
    (kind, encode(Image.fromarray(noise(height, width, 3)).convert(mode), kind))
    for kind, modes in MODES.items()
    for mode in modes
    for width, height in SIZES
]
"""Images of every format, by it."""


def image_request(number: int) -> bytes:
    """Write a request with a damaged image."""
    draw = random.Random(number)
    kind, image = draw.choice(SOUND)
    for _ in range(draw.choice([1, 1, 2, 4])):
        image = draw.choice(IMAGE_MUTATIONS)(draw, kind, image)
    target = draw.choices(["/predict", "/uncertainty?samples=3", "/compare?passes=2"], [8, 2, 1])[0]
    if draw.random() < 0.3:
        target = "/v1/models/colour-cnn" + target
    return request(target, image, f"image/{kind.lower()}", f"X-Request-ID: {number}")


def flip_bits(draw: random.Random, _kind: str, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 10]) if damaged else 0):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def truncate(draw: random.Random, _kind: str, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def overwrite(draw: random.Random, _kind: str, data: bytes) -> bytes:
    """Put an extreme number somewhere near the front, where sizes are."""
    at = draw.randrange(min(len(data), 64) + 1)
    number = draw.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])
    raw = number.to_bytes(4, draw.choice(["big", "little"]))[: draw.choice([1, 2, 4])]
    return data[:at] + raw + data[at + len(raw) :]


def move_a_part(draw: random.Random, _kind: str, data: bytes) -> bytes:
    start, end, to = sorted(draw.randrange(len(data) + 1) for _ in range(3))
    return data[:start] + data[end:to] + data[start:end] + data[to:]


def repeat_a_part(draw: random.Random, _kind: str, data: bytes) -> bytes:
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] * draw.choice([1, 2, 50 if end - start < 100 else 1])


def change_chunks(draw: random.Random, kind: str, data: bytes) -> bytes:
    """Swap, repeat or leave out chunks of the format; half the time a PNG's checksums are right."""
    chunks = CHUNKS[kind](data)
    if len(chunks) > 1:
        first, second = (draw.randrange(len(chunks)) for _ in range(2))
        change = draw.choice(["swap", "repeat", "leave out"])
        if change == "swap":
            chunks[first], chunks[second] = chunks[second], chunks[first]
        elif change == "repeat":
            chunks.insert(second, chunks[first])
        else:
            del chunks[first]
    if kind == "PNG" and draw.random() < 0.5:
        chunks = [with_checksum(flip_bits(draw, kind, chunk)) for chunk in chunks]
    return b"".join(chunks)


def with_checksum(chunk: bytes) -> bytes:
    """Correct a PNG chunk's length and checksum."""
    if len(chunk) < 12 or chunk.startswith(b"\x89PNG"):
        return chunk
    content = chunk[4:-4]
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def png_chunks(data: bytes) -> list[bytes]:
    return [data[:8], *sized_chunks(data, 8, lambda at: 12 + int.from_bytes(data[at : at + 4]))]


def webp_chunks(data: bytes) -> list[bytes]:
    def length(at: int) -> int:
        return 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2

    return [data[:12], *sized_chunks(data, 12, length)]


def jpeg_segments(data: bytes) -> list[bytes]:
    return re.split(rb"(?=\xff[\xc0-\xfe])", data)


def sized_chunks(data: bytes, at: int, length: Callable[[int], int]) -> list[bytes]:
    chunks = []
    while at < len(data):
        chunks.append(data[at : at + length(at)])
        at += length(at)
    return chunks


CHUNKS = {"PNG": png_chunks, "WEBP": webp_chunks, "JPEG": jpeg_segments}
IMAGE_MUTATIONS = [
    *(flip_bits, truncate, overwrite, move_a_part, repeat_a_part, change_chunks, change_chunks)
]


@dataclass(frozen=True)
class Conversation:
    """Bytes for a connection, in pieces; the client's side is closed at once, or a moment later."""

    number: int
    pieces: list[bytes]
    closes_late: bool


NUMBERS = json.dumps({"instances": [[[0, 255], [3, 4]]]}).encode()
VALID: list[Callable[[str], bytes]] = [
    lambda name: get("/livez", name),
    lambda name: get("/readyz", name),
    lambda name: get("/nowhere", name),
    lambda name: request("/predict", PNG, "image/png", name),
    lambda name: request("/predict", PNG, "image/png", name),
    lambda name: request("/uncertainty?samples=2", PNG, "image/png", name),
    lambda name: request("/v1/models/digits-mlp/predict", PNG, "image/png", name),
    lambda name: request("/predict", NUMBERS, "application/json", name),
    lambda name: request("/compare?passes=1", PNG, "image/png", name),
    lambda name: request("/predict", b"no image", "image/png", name),
    lambda name: chunked("/predict", PNG, name),
]
LINES = [
    *("Host: y", "Content-Length: 5", "Content-Length: 0", "Content-Length: 99999999999999999999"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Connection: close"),
    *("Connection: Upgrade\r\nUpgrade: h2c", "Expect: 100-continue", "Content-Encoding: gzip"),
    *("Origin: http://x", "X: " + "a" * 5_000, "X:", ": x", "X : y", " folded", "X: \0", "X: \xff"),
    *("Accept: */*", "X-Request-ID: a b", "Connection: keep-alive", "Content-Length: +5"),
]
SEPARATORS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b"HTTP/1.1",
    b"0\r\n\r\n",
]


def conversation(number: int) -> Conversation:
    """Make one to four requests, damage some, and cut them where it may be."""
    draw = random.Random(number)
    raw = b""
    for place in range(draw.choice([1, 1, 2, 3, 4])):
        message = draw.choice(VALID)(f"X-Request-ID: {number}-{place}")
        if draw.random() < 0.6:
            message = draw.choice(HTTP_MUTATIONS)(draw, message)
        raw += message
    if draw.random() < 0.3:
        raw = draw.choice([flip_bits, truncate, move_a_part])(draw, "", raw)
    cuts = sorted(draw.randrange(len(raw) + 1) for _ in range(draw.choice([0, 0, 1, 2, 5])))
    ends = zip([0, *cuts], [*cuts, len(raw)], strict=True)
    return Conversation(number, [raw[a:b] for a, b in ends], draw.random() < 0.5)


def chunked(target: str, body: bytes, *headers: str) -> bytes:
    """Write a request whose body comes in chunks."""
    about = "Content-Type: image/png", "Transfer-Encoding: chunked", *headers
    pieces = [body[:7], body[7:50], body[50:]]
    return head("POST", target, *about) + b"".join(map(chunk, [*pieces, b""]))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def another_line(draw: random.Random, message: bytes) -> bytes:
    lines = message.split(b"\r\n")
    lines.insert(draw.randint(1, 3), draw.choice(LINES).encode("latin-1"))
    return b"\r\n".join(lines)


def a_line_less(draw: random.Random, message: bytes) -> bytes:
    lines = message.split(b"\r\n")
    del lines[draw.randrange(4)]
    return b"\r\n".join(lines)


def a_line_twice(draw: random.Random, message: bytes) -> bytes:
    lines = message.split(b"\r\n")
    place = draw.randrange(1, 4)
    return b"\r\n".join([*lines[:place], lines[place], *lines[place:]])


def another_version(draw: random.Random, message: bytes) -> bytes:
    version = draw.choice([b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"http/1.1", b""])
    return message.replace(b"HTTP/1.1", version, 1)


def another_method(draw: random.Random, message: bytes) -> bytes:
    methods = [b"GET", b"POST", b"PUT", b"OPTIONS", b"CONNECT", b"BREW", b"get", b"", b"PRI"]
    return draw.choice(methods) + message[message.index(b" ") :]


def another_target(draw: random.Random, message: bytes) -> bytes:
    targets = [
        b"*",
        b"/",
        b"//",
        b"/%00",
        b"/predict#a",
        b"http://x/predict",
        b"/\xff",
        b"/a b",
        b"",
    ]
    _, _, rest = message.partition(b" ")
    return message.split(b" ")[0] + b" " + draw.choice(targets) + rest[rest.index(b" ") :]


def another_length(draw: random.Random, message: bytes) -> bytes:
    change = draw.choice([-5, -1, 1, 5, 1000, -1_000])
    return re.sub(
        rb"(?<=Content-Length: )\d+", lambda found: b"%d" % (int(found[0]) + change), message
    )


def a_separator_more(draw: random.Random, message: bytes) -> bytes:
    at = draw.randrange(len(message))
    return message[:at] + draw.choice(SEPARATORS) + message[at:]


def bare_line_feeds(_draw: random.Random, message: bytes) -> bytes:
    return message.replace(b"\r\n", b"\n")


def garbage_behind(draw: random.Random, message: bytes) -> bytes:
    return message + draw.choice([b"\x16\x03\x01", b"garbage\r\n\r\n", b"\0", b"\r\n", b"GET"])


HTTP_MUTATIONS = [
    *(another_line, another_line, another_line, a_line_less, a_line_twice, another_version),
    *(another_method, another_target, another_length, another_length, a_separator_more),
    *(bare_line_feeds, garbage_behind),
]

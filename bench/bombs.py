"""Images that are small to send and take much memory or time to read, if nothing bounds it."""

import io
import struct
import zlib

from PIL import Image

_LENGTHS = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
"""Of codes, in the order in which a lossless WebP names them."""


def png_of_text(megabytes: int = 63) -> bytes:
    """Compressed text of so many megabytes: what Pillow takes at most."""
    bomb = zlib.compress(bytes(2**20 - 9), 9)
    return _png(b"".join(_chunk(b"zTXt", b"%d\0\0" % k + bomb) for k in range(megabytes)))


def png_of_chunks(size: int) -> bytes:
    """So many bytes of empty chunks."""
    return _png(b"".join(_chunk(b"tEXt", b"%d\0" % k) for k in range(size // 24)))


def png_of_exif(size: int) -> bytes:
    """An EXIF tag of so many bytes of numbers, and an orientation: rewriting it unpacks them."""
    orientation = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)
    numbers = struct.pack("<HHLL", 0x9286, 3, size // 2, 38)
    directory = b"II*\0" + struct.pack("<LH", 8, 2) + orientation + numbers + bytes(4)
    return _png(_chunk(b"eXIf", directory + bytes(range(1, 251)) * (size // 250)))


def jpeg_of_segments(size: int) -> bytes:
    """So many bytes of empty segments."""
    small = encoded("L", (8, 8), "JPEG")
    return small[:2] + b"\xff\xe1\0\2" * (size // 4 - 1000) + small[2:]


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose every scan refines nothing, for all pixels."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data

    def scan(first: int, last: int, high: int, low: int) -> bytes:
        return segment(0xDA, bytes((1, 1, 0, first, last, high << 4 | low)))

    def bits(text: str) -> bytes:
        text += "1" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")

    one_code = bytes((1, *[0] * 15))
    blocks = ((side + 7) // 8) ** 2
    runs = bits(("0" + "1" * 14) * -(-blocks // 32_767))  # ends of bands, of 32,767 blocks each
    return b"".join(
        (
            b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"),
            segment(0xC4, b"\x00" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0"),
            scan(0, 0, 0, 0) + bits("0" * blocks),
            scan(1, 63, 0, 1) + runs,
            (scan(1, 63, 1, 0) + runs) * scans,
            b"\xff\xd9",
        )
    )


def webp_of_tables(side: int) -> bytes:
    """A lossless WebP with as many groups of Huffman tables as it may have, of 2,048 codes each."""
    groups = min((-(-side // 4)) ** 2, 65_536)
    out: list[str] = []

    def write(value: int, width: int) -> None:
        out.append(format(value, f"0{width}b")[::-1])

    def one_code() -> None:
        write(0b0001, 4)

    def equal_codes(length: int, symbols: int | None) -> None:
        index = _LENGTHS.index(length)
        write(0, 1)
        write(index + 1 - 4, 4)
        for _ in range(index):
            write(0, 3)
        write(1, 3)
        if symbols is None:
            write(0, 1)
        else:
            write(1, 1)
            write(5, 3)
            write(symbols - 2, 12)

    write(0x2F, 8)
    write(side - 1, 14)
    write(side - 1, 14)
    write(0, 5)  # no alpha, version 0, no transform
    write(0b10111, 5)  # a colour cache of 11 bits
    write(1, 4)  # tiles of 4 x 4 pixels
    write(0, 1)
    equal_codes(8, 256)
    equal_codes(8, None)
    for _ in range(3):
        one_code()
    for tile in range((-(-side // 4)) ** 2):
        group = min(tile, groups - 1)
        out.append(format(group & 255, "08b") + format(group >> 8, "08b"))
    start = len(out)
    equal_codes(11, 2048)
    for _ in range(4):
        one_code()
    out.append("".join(out[start:]) * (groups - 1) + "0" * 64)
    text = "".join(out)
    text += "0" * (-len(text) % 16)
    data = int(text[::-1], 2).to_bytes(len(text) // 8, "little")
    head = b"RIFF" + struct.pack("<L", len(data) + 12) + b"WEBPVP8L" + struct.pack("<L", len(data))
    return head + data


def encoded(mode: str, size: tuple[int, int], kind: str, **options: object) -> bytes:
    """Encode an empty image."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def _png(between: bytes) -> bytes:
    """A grey PNG with chunks after its header."""
    small = encoded("L", (8, 8), "PNG")
    return small[:33] + between + small[33:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

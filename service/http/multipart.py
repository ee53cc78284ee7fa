"""multipart/form-data (RFC 7578) in memory, over python-multipart's parser, with limits."""

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dropserve.service.errors import MalformedRequest

MAX_PARTS = 1000


@dataclass
class Part:
    """One part: its name, whether it came as a file, its own content type and bytes."""

    name: str = ""
    has_filename: bool = False
    content_type: str | None = None
    data: bytes = b""


def parse_multipart(body: bytes, content_type: str) -> list[Part]:
    """Split a body into parts. File names are looked for, never kept.

    Raises:
        MalformedRequest: no sound multipart body with that boundary.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046, section 5.1.1
        raise MalformedRequest("multipart needs a boundary of 1 to 70 characters")
    collector = _Collector()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": collector.begin,
                "on_header_field": collector.header_name,
                "on_header_value": collector.header_value,
                "on_header_end": collector.header_end,
                "on_headers_finished": collector.headers_finished,
                "on_part_data": collector.part_data,
                "on_part_end": collector.end,
                "on_end": collector.finish,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest("the body is not sound multipart/form-data") from error
    if not collector.finished:
        raise MalformedRequest("the multipart body ends before its closing boundary")
    return collector.parts


@dataclass
class _Collector:
    """Receives the parser's callbacks."""

    parts: list[Part] = field(default_factory=list)
    finished: bool = False
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _name: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _data: list[bytes] = field(default_factory=list)

    def begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise MalformedRequest(f"the body has more than {MAX_PARTS} parts")
        self.parts.append(Part())
        self._headers = {}
        self._data = []

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if kind != b"form-data" or not options.get(b"name"):
            raise MalformedRequest("a part has no `Content-Disposition: form-data` with a name")
        media_type = self._headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type.startswith(b"multipart/"):
            raise MalformedRequest("a part is multipart itself")
        part = self.parts[-1]
        part.name = options[b"name"].decode("utf-8", "replace")
        part.has_filename = b"filename" in options
        part.content_type = media_type.decode("latin-1") or None

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def end(self) -> None:
        self.parts[-1].data = b"".join(self._data)

    def finish(self) -> None:
        self.finished = True

"""The head of a request: its limits, and the grammar that it must keep.

What two parsers could read differently is refused before uvicorn's parser sees it. The fast path,
which has a parser of its own, takes only requests whose fields it knows.
"""

import re
from dataclasses import dataclass

from dropserve.service.errors import HeadTooLarge, MalformedRequest, UriTooLong

MAX_HEAD = 65_536
"""Bytes of a request's first line and header fields."""
MAX_FIELDS = 100
"""Header fields of a request."""
MAX_TARGET = 8_192
"""Bytes of the path and the query."""
Fields = list[tuple[bytes, bytes]]
"""Header fields: names in lower case, and values."""
END = b"\r\n\r\n"
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_REQUEST_LINE = re.compile(rb"(%b+) ([!-~]+) HTTP/([0-9]\.[0-9])" % _TOKEN)
_FIRST_BYTES = re.compile(rb"%b+(?: [^\0\n]*)?" % _TOKEN)
_FIELDS = re.compile(rb"(?:\r\n%b+:[^\0-\x08\x0a-\x1f\x7f]*)*\r\n\r\n" % _TOKEN)
_FRAMING = {b"host", b"content-length", b"transfer-encoding"}
_LENGTH = re.compile(rb"[0-9]{1,18}")


@dataclass(slots=True, eq=False)
class Head:
    """A head that keeps the grammar and the limits.

    Attributes:
        method, target, version: of the first line; the target is path and query, the version 1.0
            or 1.1.
        length: of the body, in bytes; None: it comes in chunks.
        fields: all of them.
    """

    method: bytes
    target: bytes
    version: bytes
    length: int | None
    fields: Fields


def check_beginning(received: bytes) -> None:
    """Check the first bytes of a head.

    Raises:
        MalformedRequest: no request begins so.
        UriTooLong, HeadTooLarge: they are too many already.
    """
    line, newline, _ = received.partition(b"\n")
    if newline:
        check_request_line(line.removesuffix(b"\r") if line.endswith(b"\r") else line + b"\n")
    elif not _FIRST_BYTES.fullmatch(line):
        raise MalformedRequest("this is no HTTP request")
    elif len(line) > MAX_TARGET + 64:
        raise _uri_too_long()
    if len(received) > MAX_HEAD or received.count(b"\n") > MAX_FIELDS + 1:
        raise head_too_large()


def read_head(received: bytes) -> Head:
    """Read a whole head, to the end of its empty line.

    Raises:
        MalformedRequest: it breaks the rules of HTTP, has an unknown version, not one Host, or a
            body whose end is ambiguous.
        UriTooLong, HeadTooLarge: it is beyond the limits.
    """
    line, _, rest = received.partition(b"\r\n")
    method, target, version = check_request_line(line)
    if len(received) > MAX_HEAD or received.count(b"\r\n") > MAX_FIELDS + 2:
        raise head_too_large()
    if not _FIELDS.fullmatch(received, len(line)):
        raise MalformedRequest("the head breaks the rules of HTTP")
    parts = [field.partition(b":") for field in rest[:-4].split(b"\r\n") if field]
    fields = [(name.lower(), value.lstrip(b" \t").rstrip(b" ")) for name, _, value in parts]
    framing = [field for field in fields if field[0] in _FRAMING]
    given = dict(framing)
    if len(given) != len(framing) or (version == b"1.1" and b"host" not in given):
        raise MalformedRequest("there must be one Host, and one length of the body at most")
    length, coding = given.get(b"content-length"), given.get(b"transfer-encoding")
    if coding is None and (length is None or _LENGTH.fullmatch(length)):
        return Head(method, target, version, int(length or 0), fields)
    if coding is None or coding.lower() != b"chunked" or length is not None or version == b"1.0":
        raise MalformedRequest("the body must have a Content-Length, or be chunked, and no more")
    return Head(method, target, version, None, fields)


def check_request_line(line: bytes) -> tuple[bytes, bytes, bytes]:
    """Check a request line; return the method, the target and the version of HTTP."""
    if len(line) > MAX_TARGET + 64:
        raise _uri_too_long()
    found = _REQUEST_LINE.fullmatch(line)
    if found is None or found[3] not in (b"1.0", b"1.1"):
        raise MalformedRequest("this is no request of HTTP/1.1 or 1.0")
    if len(found[2]) > MAX_TARGET:
        raise _uri_too_long()
    return found[1], found[2], found[3]


def _uri_too_long() -> UriTooLong:
    return UriTooLong(f"the path and the query have more than {MAX_TARGET} bytes")


def head_too_large() -> HeadTooLarge:
    """Make the error of fields, or trailers, that are beyond the limits."""
    return HeadTooLarge(
        f"the head has more than {MAX_HEAD} bytes, or more than {MAX_FIELDS} header fields"
    )

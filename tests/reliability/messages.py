"""HTTP/1.1 messages as bytes: requests are written and answers are read without a library.

A client library would repair, or refuse to send, what these tests send.
"""

from dataclasses import dataclass

from tests.helpers import PNG


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: names of its headers are in lower case, of two of a name the last stays."""

    status: int
    headers: dict[str, str]
    body: bytes


def request(
    target: str = "/predict",
    body: bytes = PNG,
    content_type: str = "image/png",
    *headers: str,
    method: str = "POST",
) -> bytes:
    """Write a request with a body."""
    about = f"Content-Type: {content_type}", f"Content-Length: {len(body)}"
    return head(method, target, *about, *headers) + body


def get(target: str, *headers: str) -> bytes:
    """Write a GET."""
    return head("GET", target, *headers)


def head(method: str, target: str, *headers: str) -> bytes:
    """Write the head of a request, up to and with the empty line."""
    lines = f"{method} {target} HTTP/1.1", "Host: x", *headers, "", ""
    return "\r\n".join(lines).encode("latin-1")


def head_of_image(length: int = len(PNG)) -> bytes:
    """Write the head of a request for a prediction."""
    return head("POST", "/predict", "Content-Type: image/png", f"Content-Length: {length}")


def first_answer(received: bytes | bytearray) -> tuple[Answer, int] | None:
    """Read the first answer; return it and its length in bytes. None: it is not complete."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    start, *lines = bytes(received[:end]).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    status = int(start.split(" ", 2)[1])
    if headers.get("transfer-encoding") == "chunked":
        found = _chunks(received, end + 4)
    else:
        has_body = status >= 200 and status not in (204, 304)
        stop = end + 4 + (int(headers.get("content-length", "0")) if has_body else 0)
        found = (bytes(received[end + 4 : stop]), stop) if stop <= len(received) else None
    return found and (Answer(status, headers, found[0]), found[1])


def _chunks(received: bytes | bytearray, at: int) -> tuple[bytes, int] | None:
    """Read a chunked body that starts there; return it and its end. None: it is not complete."""
    body = bytearray()
    while (line := received.find(b"\r\n", at)) >= 0:
        size = int(received[at:line], 16)
        if len(received) < line + 4 + size:
            return None
        body += received[line + 2 : line + 2 + size]
        at = line + 4 + size
        if size == 0:
            return bytes(body), at
    return None


def answers(received: bytes) -> list[Answer]:
    """Read answers that must be all that was received."""
    found = []
    while received:
        first = first_answer(received)
        assert first is not None, f"half an answer: {received[:1000]!r}"
        found.append(first[0])
        received = received[first[1] :]
    return found

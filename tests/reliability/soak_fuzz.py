"""A hundred thousand damaged requests to two servers, with the fast path and without it.

They are asked the same and must answer the same: no failure, no difference, and nothing that stays:
no descriptor, and no memory once they are warm. Every request is made from its number, so a run can
be repeated; one that goes wrong is shown whole.
"""

import asyncio
import base64
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import eventually
from tests.reliability.figures import SCALE, published
from tests.reliability.load import Usage, clients, run, send_all
from tests.reliability.messages import Answer
from tests.reliability.mutations import Conversation, conversation, image_request
from tests.service.http import test_openapi as openapi

pytestmark = pytest.mark.timeout(1_200)

TOTAL = round(100_000 * SCALE)
CONVERSATIONS = round(10_000 * SCALE)
WARM_UP = TOTAL // 10  # requests
BODIES = round(3_000 * SCALE)  # of Hypothesis
EXAMPLES = max(2, round(150 * SCALE))  # of Schemathesis, an operation
AT_ONCE = 32
GROWTH = 50e6  # bytes
SECONDS = 10  # for the end of a conversation

schema = schemathesis.openapi.from_dict(openapi.DOCUMENT)
schema.config.checks.negative_data_rejection.expected_statuses.append("413")
schema.hook(openapi.map_path_parameters)
UNHURRIED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Fuzzed:
    """Two servers, with the fast path and without; what they were asked, and what went wrong."""

    servers: list
    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    warm: list[Usage] = field(default_factory=list)
    failed_before: int = 0  # tests of other files

    def usages(self) -> list[Usage]:
        return [Usage.of(server.process.pid) for server in self.servers]

    def descriptors(self) -> list[int]:
        return [usage.descriptors for usage in self.usages()]

    def compare(self, kind: str, sent: bytes, answers: list[list[str]]) -> None:
        """Count a request; note an unplanned answer to it, or where the two servers differ."""
        self.asked[kind] += 1
        for fast, asgi in zip_longest(*answers, fillvalue=""):
            if fast != asgi or re.match(r"HTTP/1\.1 5(?!03)|no answer|no end", fast):
                shown = f"fast path: {fast[:2_000]}\n ASGI path: {asgi[:2_000]}"
                self.wrong.append(f"{kind}: {base64.b64encode(sent).decode()}\n {shown}")
                return

    def check(self, kind: str) -> None:
        wrong = [each for each in self.wrong if each.startswith(kind)]
        assert not wrong, f"{len(wrong)} of {self.asked[kind]}\n" + "\n".join(wrong[:10])


@pytest.fixture(scope="module")
def fuzzed(make_server, request):
    """Servers that are warm: they have been sent a tenth of the images."""
    found = Fuzzed([make_server(fast_path=fast).start() for fast in (True, False)])
    run(send_images(found, range(WARM_UP)))
    time.sleep(1)  # connections are closed
    found.warm = found.usages()
    found.failed_before = request.session.testsfailed
    return found


@settings(UNHURRIED, max_examples=BODIES)
@given(
    target=st.sampled_from(["/predict", "/uncertainty", "/compare", "/v2/models/digits-mlp/infer"]),
    query=st.dictionaries(
        st.sampled_from(["samples", "seed", "masks", "level", "scale", "passes"]) | st.text(),
        st.integers().map(str) | st.floats().map(str) | st.text(),
        max_size=3,
    ),
    body=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["instances", "images", "scale", "inputs", "parameters"])
                | st.text(),
                inner,
                max_size=4,
            )
        ),
        max_leaves=20,
    ).map(lambda value: json.dumps(value).encode()),
    content_type=st.sampled_from(
        ["application/json", "image/png", "multipart/form-data; boundary=a"]
    ),
)
def test_bodies_and_queries_of_hypothesis(target, query, body, content_type, fuzzed):
    headers = {"Content-Type": content_type, "X-Request-ID": "same"}
    encoded = {to_utf8(name): to_utf8(value) for name, value in query.items()}
    answers = [
        httpx.post(server.url + target, params=encoded, content=body, headers=headers)
        for server in fuzzed.servers
    ]
    fuzzed.compare(
        "hypothesis",
        answers[0].request.url.raw_path + b" " + body,
        [[shown(a.status_code, a.headers.get("content-type"), a.content)] for a in answers],
    )
    fuzzed.check("hypothesis")


@schema.parametrize()
@settings(UNHURRIED, max_examples=EXAMPLES)
def test_the_openapi_document(case, fuzzed):
    fuzzed.asked["schemathesis"] += 1
    openapi.check(case, fuzzed.servers[0].url, {})


def test_mutated_conversations(fuzzed):
    run(send_conversations(fuzzed, range(CONVERSATIONS)))
    fuzzed.check("conversation")


def test_mutated_images(fuzzed):
    rest = TOTAL - (fuzzed.asked.total() - fuzzed.asked["conversation"])
    run(send_images(fuzzed, range(WARM_UP, WARM_UP + rest)))
    fuzzed.check("image")


def test_nothing_stays(fuzzed, request):
    with published("fuzz", "make soak SOAK=fuzz") as figures:
        eventually(
            lambda: (
                [u.descriptors for u in fuzzed.usages()] == [u.descriptors for u in fuzzed.warm]
            ),
            10,
        )
        failed = request.session.testsfailed - fuzzed.failed_before
        usages = fuzzed.usages()
        pairs = [*zip(usages, fuzzed.warm, strict=True)]
        growth = [now.resident - warm.resident for now, warm in pairs]
        figures |= {f"requests, {kind}": n for kind, n in sorted(fuzzed.asked.items())}
        figures |= {
            "unplanned 5xx, missing answers, or differences between the paths": len(fuzzed.wrong),
            "tests that failed": failed,
            "memory growth after the warm-up, fast path, MB": round(growth[0] / 1e6, 1),
            "memory growth after the warm-up, ASGI path, MB": round(growth[1] / 1e6, 1),
            "descriptors more than before": max(
                now.descriptors - w.descriptors for now, w in pairs
            ),
        }
        assert not failed
        assert max(growth) < GROWTH
        for server in fuzzed.servers:
            assert server.process.poll() is None
            assert "Traceback" not in server.errors.read_text()


async def send_images(fuzzed: Fuzzed, numbers: range) -> None:
    """Send damaged images to both servers, over connections that stay open where they may."""
    first, second = (server.port for server in fuzzed.servers)
    async with clients(first, AT_ONCE) as fast, clients(second, AT_ONCE) as asgi:

        async def ask(raw: bytes) -> list[list[str]]:
            answers = await asyncio.gather(fast.ask(raw), asgi.ask(raw), return_exceptions=True)
            return [[shown_answer(answer)] for answer in answers]

        async for raw, answers in send_all(ask, map(image_request, numbers), AT_ONCE):
            fuzzed.compare("image", raw, answers)


async def send_conversations(fuzzed: Fuzzed, numbers: range) -> None:
    """Have damaged conversations with both servers, each over a connection of its own."""
    ports = [server.port for server in fuzzed.servers]

    async def ask(made: Conversation) -> list[list[str]]:
        answers = await asyncio.gather(*(converse(port, made) for port in ports))
        if any(parts[-1] == "reset" for parts in answers):  # what was under way is lost
            received = min(len(parts) for parts in answers) - 2
            return [parts[: max(0, received)] for parts in answers]
        return list(answers)

    async for made, answers in send_all(ask, map(conversation, numbers), 2 * AT_ONCE):
        sent = b"|".join(made.pieces) + b"|" * made.closes_late
        fuzzed.compare("conversation", sent, answers)


async def converse(port: int, made: Conversation) -> list[str]:
    """Send the pieces and close this side; return the answers, and last how it ended."""
    loop = asyncio.get_running_loop()
    transport, heard = await loop.create_connection(Heard, "127.0.0.1", port)
    try:
        async with asyncio.timeout(SECONDS):
            for piece in made.pieces:
                heard.send(piece)
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.3 * made.closes_late)
            heard.send(None)
            await heard.ended
        end = "reset" if heard.ended.result() else "closed"
    except TimeoutError:
        end = "no end"
    transport.abort()
    parts = re.split(r"(?=HTTP/1\.1 \d{3} )", heard.received.decode("latin-1"))
    final = [part for part in parts if part and not part.startswith("HTTP/1.1 100")]
    return [*map(masked, final), end]


class Heard(asyncio.Protocol):
    """A connection, all that came over it, and the error that ended it, or None."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.received = bytearray()
        self.ended = asyncio.get_running_loop().create_future()
        self._transport = transport

    def send(self, data: bytes | None) -> None:
        """Send bytes, or the end; nothing, if the other side has closed."""
        if not self._transport.is_closing():
            self._transport.write_eof() if data is None else self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


def shown_answer(answer: Answer | BaseException) -> str:
    if isinstance(answer, BaseException):
        return f"no answer: {answer!r}"
    return shown(answer.status, answer.headers.get("content-type"), answer.body)


def shown(status: int, content_type: str | None, body: bytes) -> str:
    return masked(f"HTTP/1.1 {status} {content_type}\n{body.decode('latin-1')}")


def masked(text: str) -> str:
    """Leave out what may differ: dates, ids that were made, and digits of probabilities.

    Of a 400 also id and wording: damage is refused as soon as it is seen, and what has arrived by
    then is a matter of time. So is if the end of what a client sends was seen before its last
    answer, which then announces that the connection is closed; that it is closed is compared.
    """
    text = re.sub(r"(?im)^connection: close\r?\n", "", text)
    text = re.sub(r"(?im)^(date|content-length): .*$", r"\1: #", text)
    if text.startswith("HTTP/1.1 400"):
        text = re.sub(r'(x-request-id: |"detail":"|"request_id":")[^"\r]*', r"\1#", text)
    return re.sub(r"\b[0-9a-f]{32}\b|(?<!HTTP/)\b\d+\.\d+(e-?\d+)?|\b\d+e-\d+", "#", text)


def to_utf8(text: str) -> str:
    """Replace what no URL can have: lone surrogates."""
    return text.encode("utf-8", "replace").decode()

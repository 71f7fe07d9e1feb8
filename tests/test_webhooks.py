"""The webhook listener on a real socket: every answer of contract.md section 4, and what is kept by then."""

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from linked import PLAN, link
from manual_clock import ManualClock
from silent_postgres import reached_through
from sqlalchemy.ext.asyncio import create_async_engine

from billingd.intake import Intake
from billingd.store import links, migrate, schema
from billingd.store.engine import Store, StoreDamaged, Tx
from billingd.webhooks import (
    AMPLIFY_PATHS,
    SIGNATURES_MAX,
    STORE_SECONDS,
    Authenticator,
    Tally,
    WebhookListener,
)

SECRET = "correct-horse"
MAX = 2_000
PATHS = (*AMPLIFY_PATHS, "/webhooks/recurly")
SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
"""For answers that the store has no part in."""


def event(
    number: int = 1, kind: Any = "ProductPlan", type_: str = "SubResourceUpdated", **payload: Any
) -> Any:
    """An Amplify event."""
    metadata = {"id": "p1", "resourceVersion": "7"} | payload.pop("metadata", {})
    return {
        "id": f"e{number}",
        "type": type_,
        "payload": {"kind": kind, "name": "metered", "metadata": metadata, "state": "active"} | payload,
        "metadata": {"subresource": "state"} if type_ == "SubResourceUpdated" else {},
        "correlationId": "c1",
    }


NOTIFICATION = {"id": "r1", "object_type": "account", "event_type": "updated", "uuid": "u1"}


class Listening:
    """A listener on a free port."""

    def __init__(
        self, store: Store, clock: ManualClock, auth: str, secrets: str, store_seconds: float
    ) -> None:
        self.store = store
        self.clock = clock
        self.tally = Tally()
        self.woken = asyncio.Event()
        listener = WebhookListener(
            Intake(store, clock, self.woken.set),
            clock,
            Authenticator(auth, secrets),
            body_bytes_max=MAX,
            tally=self.tally,
            store_seconds=store_seconds,
        )
        self.server = TestServer(listener.application())
        self.session: ClientSession

    async def send(self, path: str = PATHS[0], body: Any = None, **options: Any) -> tuple[int, Any, Any]:
        """Status, JSON and headers of a delivery; authorised unless headers say otherwise."""
        if body is not None:
            options["data"] = body if isinstance(body, bytes) else json.dumps(body)
        headers = {"Authorization": SECRET, "Content-Type": "application/json"}
        options["headers"] = headers | options.pop("headers", {})
        options["headers"] = {name: value for name, value in options["headers"].items() if value is not None}
        method = options.pop("method", "POST")
        async with self.session.request(method, self.server.make_url(path), **options) as answer:
            text = await answer.text()
            if method == "HEAD":
                return answer.status, None, answer.headers
            assert answer.content_type == "application/json"
            return answer.status, json.loads(text), answer.headers

    async def raw(self, text: bytes) -> bytes:
        """What comes back for these bytes, up to the end of the headers."""
        assert self.server.port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(text)
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return answer

    async def rows(self, table: sa.Table) -> list[dict[str, Any]]:
        async with self.store.read() as tx:
            return [dict(row) for row in (await tx.execute(sa.select(table))).mappings()]

    async def kept(self) -> tuple[int, int]:
        """How many events and actions are kept."""
        return len(await self.rows(schema.events)), len(await self.rows(schema.outbox))


@asynccontextmanager
async def listening(
    store: Store,
    clock: ManualClock,
    auth: str = "header:Authorization",
    secrets: str = SECRET,
    store_seconds: float = STORE_SECONDS,
) -> AsyncIterator[Listening]:
    made = Listening(store, clock, auth, secrets, store_seconds)
    async with made.server, ClientSession() as made.session:
        yield made


@pytest.fixture
async def hook(store: Store, clock: ManualClock) -> AsyncIterator[Listening]:
    async with listening(store, clock) as made:
        yield made


async def test_an_event_is_accepted_once_on_every_path(hook: Listening) -> None:
    """202 with its id, whether it is known, and how many actions it led to; again, it changes nothing."""
    for number, path in enumerate(AMPLIFY_PATHS):
        body = event(number)
        status, answer, _ = await hook.send(path, body)
        assert (status, answer) == (202, {"event": f"e{number}", "duplicate": False, "actions": 1})
        for again in AMPLIFY_PATHS:
            status, answer, _ = await hook.send(again, body)
            assert (status, answer) == (202, {"event": f"e{number}", "duplicate": True, "actions": 0})
    status, answer, _ = await hook.send(PATHS[3], NOTIFICATION, headers={"recurly-notification-id": "n1"})
    assert (status, answer) == (202, {"event": "n1", "duplicate": False, "actions": 0})
    assert await hook.kept() == (4, 3)
    assert (hook.tally.accepted, hook.tally.duplicates, hook.tally.rejected) == (4, 9, 0)
    assert hook.woken.is_set()


async def test_what_is_kept_of_an_event(hook: Listening) -> None:
    """The event by source and id, its actions with the event's id: from a delivery to its effects."""
    await hook.send(body=event())
    [row] = await hook.rows(schema.events)
    [action] = await hook.rows(schema.outbox)
    assert {name: row[name] for name in ("source", "id", "kind", "name", "resource_id", "subresource")} == {
        "source": "amplify",
        "id": "e1",
        "kind": "ProductPlan",
        "name": "metered",
        "resource_id": "p1",
        "subresource": "state",
    }
    assert (row["received_at"], row["correlation_id"]) == (hook.clock.now(), "c1")
    assert (action["kind"], action["subject"], action["event_id"]) == ("provision_plan", "plan:metered", "e1")
    assert action["due_at"] == hook.clock.now()


async def test_the_same_event_sent_at_once_is_one_event(hook: Listening) -> None:
    """However many deliveries race, one is new."""
    answers = await asyncio.gather(*(hook.send(body=event()) for _ in range(8)))
    assert {status for status, _, _ in answers} == {202}
    assert sorted(answer["duplicate"] for _, answer, _ in answers) == [False] + [True] * 7
    assert await hook.kept() == (1, 1)


async def test_the_answer_comes_after_the_commit(hook: Listening) -> None:
    """Event and actions are committed, together, before the 202 is sent, and a stranger can read them."""
    order: list[str] = []
    engine = hook.store._writer.sync_engine
    sa.event.listen(engine, "commit", lambda _: order.append("committed"))
    for number in range(3):
        status, answer, _ = await hook.send(body=event(number))
        order.append(f"answered {status}")
        assert answer["actions"] == 1
        if hook.store.sqlite:
            with sqlite3.connect(str(hook.store.path)) as stranger:
                for table in ("events", "outbox"):
                    found = stranger.execute(f"SELECT count(*) FROM {table}").fetchone()
                    assert found == (number + 1,)
            stranger.close()
        else:
            other = create_async_engine(hook.store.url)
            async with other.connect() as connection:
                for name in ("events", "outbox"):
                    counted = await connection.execute(sa.text(f"SELECT count(*) FROM {name}"))
                    assert counted.scalar_one() == number + 1
            await other.dispose()
    assert order == ["committed", "answered 202"] * 3


async def test_a_commit_that_fails_is_no_202(hook: Listening) -> None:
    """The last moment at which it can go wrong: 503, and nothing is kept."""

    def fail(_: sa.Connection) -> None:
        raise sa.exc.OperationalError("COMMIT", {}, OSError("disk I/O error"))

    engine = hook.store._writer.sync_engine
    sa.event.listen(engine, "commit", fail)
    status, answer, headers = await hook.send(body=event())
    assert (status, answer["error"]["code"]) == (503, "store_unavailable")
    assert int(headers["Retry-After"]) > 0
    sa.event.remove(engine, "commit", fail)
    assert await hook.kept() == (0, 0)
    status, answer, _ = await hook.send(body=event())
    assert (status, answer["duplicate"]) == (202, False)


@SQLITE
async def test_sqlite_syncs_each_commit_to_disk(store: Store) -> None:
    """What the promise of durability rests on."""
    async with store.write() as tx:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert (await tx.execute(sa.text(f"PRAGMA {pragma}"))).scalar_one() == value


async def _pragma(store: Store, statement: str) -> None:
    """On the one connection that writes."""
    async with store._writer.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        await (await raw.execute(statement)).close()


@asynccontextmanager
async def _full(store: Store) -> AsyncIterator[None]:
    await _pragma(store, "PRAGMA max_page_count = 1")
    with sqlite3.connect(str(store.path)) as other:  # use up what is free inside the file
        other.execute("CREATE TABLE filler (x)")
        other.commit()
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    yield
    await _pragma(store, "PRAGMA max_page_count = 1000000")


@asynccontextmanager
async def _read_only(store: Store) -> AsyncIterator[None]:
    await _pragma(store, "PRAGMA query_only = ON")
    yield
    await _pragma(store, "PRAGMA query_only = OFF")


@asynccontextmanager
async def _locked(store: Store) -> AsyncIterator[None]:
    await _pragma(store, "PRAGMA busy_timeout = 10")
    other = sqlite3.connect(str(store.path), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


@SQLITE
@pytest.mark.parametrize("trouble", [_full, _read_only, _locked])
async def test_a_sqlite_store_that_cannot_commit_is_a_503_until_it_can(hook: Listening, trouble: Any) -> None:
    """Full, read-only or locked: nothing is kept of what was not acknowledged, and it resumes by itself."""
    await hook.send(body=event(0))
    before = await hook.kept()
    async with trouble(hook.store):
        statuses = set()
        for number in range(1, 4):
            # large enough to need a new page soon
            status, answer, headers = await hook.send(body=event(number, name="n" * 90))
            statuses.add(status)
            if status == 503:
                assert answer["error"]["code"] == "store_unavailable"
                assert int(headers["Retry-After"]) > 0
                assert "nothing of it was kept" in answer["error"]["message"]
        if trouble is not _full:
            assert statuses == {503}
            assert await hook.kept() == before
        for number in range(4, 400):
            if trouble is not _full or 503 in statuses:
                break
            status, _, _ = await hook.send(body=event(number, name="n" * 90))
            statuses.add(status)
        assert 503 in statuses
        kept = await hook.kept()
        assert kept[0] == kept[1], "an event without its action is worse than none"
    status, answer, _ = await hook.send(body=event(1000))
    assert (status, answer["actions"]) == (202, 1)
    assert hook.tally.unavailable >= 1


async def test_a_postgres_that_is_read_only_or_away_is_a_503_until_it_is_back(
    empty_postgres_url: str, postgres: str, clock: ManualClock
) -> None:
    """A standby, a restart, a refused connection: 503, nothing kept, and no daemon that dies of it."""
    database = str(sa.make_url(empty_postgres_url).database)
    admin = create_async_engine(
        sa.make_url(empty_postgres_url).set(database="postgres"), isolation_level="AUTOCOMMIT"
    )

    async def sql(*statements: str) -> None:
        async with admin.connect() as connection:
            for statement in statements:
                await connection.execute(sa.text(statement))

    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    troubles = [
        (
            f"ALTER DATABASE {database} SET default_transaction_read_only = on",
            f"ALTER DATABASE {database} RESET default_transaction_read_only",
        ),
        (
            f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS false",
            f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS true",
        ),
    ]
    async with Store(empty_postgres_url) as store:
        await migrate.upgrade(store)
        async with listening(store, clock) as hook:
            for number, (begin, end) in enumerate(troubles):
                await sql(begin, cut)
                status, answer, headers = await hook.send(body=event(number))
                assert (status, answer["error"]["code"]) == (503, "store_unavailable"), begin
                assert "Retry-After" in headers
                await sql(end, cut)
                assert await hook.kept() == (number, number)
                status, answer, _ = await hook.send(body=event(number))
                assert (status, answer["duplicate"]) == (202, False)
            await sql(cut)  # connections that were cut while idle are no reason for a 503
            status, _, _ = await hook.send(body=event(9))
            assert status == 202
    await admin.dispose()


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
async def test_a_postgres_that_falls_silent_is_a_503_in_time(store_url: str, clock: ManualClock) -> None:
    """And a 202 as soon as it is back."""
    async with (
        reached_through(store_url) as (url, silent),
        Store(url, statement_seconds=0.1) as store,
        listening(store, clock, store_seconds=0.1) as hook,
    ):
        silent.set()
        status, answer, headers = await hook.send(body=event(777))
        assert (status, answer["error"]["code"]) == (503, "store_unavailable")
        assert "Retry-After" in headers
        assert hook.tally.unavailable == 1
        silent.clear()
        status, _, _ = await hook.send(body=event(777))
        assert status == 202


@SQLITE
async def test_what_is_not_an_event_is_a_400_and_not_kept(hook: Listening) -> None:
    """Not JSON, not an object, no id, a type nobody knows, an id both databases could not keep."""
    bad = [
        b"",
        b"{",
        b"\xff\xfe\xff",
        b"[]",
        b"null",
        b"1" * 1900,
        b"[" * 1900,
        {"id": "e1"},
        event() | {"id": ""},
        event() | {"id": 7},
        event() | {"id": "x" * 101},
        event() | {"id": "a\x00b"},
        event() | {"id": "\ud800"},
        event() | {"type": "Nonsense"},
        event() | {"type": []},
        event() | {"payload": []},
        event(name=""),
        event(name="n" * 101),
        event(kind=None),
    ]
    for body in bad:
        status, answer, _ = await hook.send(body=body)
        assert status == 400, body
        assert answer["error"]["code"] in {"not_json", "not_an_event"}
        assert answer["error"]["message"]
    for body in (b"{", {"id": "r1"}, NOTIFICATION | {"event_type": []}):
        status, answer, _ = await hook.send(PATHS[3], body)
        assert status == 400, body
    assert await hook.kept() == (0, 0)
    assert hook.tally.rejected == len(bad) + 3


@SQLITE
async def test_other_methods_and_paths(hook: Listening) -> None:
    """405 says what is allowed, 404 where webhooks are taken."""
    for path in PATHS:
        for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
            status, answer, headers = await hook.send(path, method=method)
            assert (status, headers["Allow"]) == (405, "POST")
            assert method == "HEAD" or answer["error"]["code"] == "method_not_allowed"
    status, answer, _ = await hook.send("/elsewhere", {})
    assert status == 404
    assert "/webhooks/amplify" in answer["error"]["message"]


@SQLITE
async def test_other_content_types_are_a_415(hook: Listening) -> None:
    """A parameter is fine; something that is not JSON, or says nothing, is not read."""
    for path in PATHS:
        for content_type in ("text/plain", "application/xml", "application/jsonx", "multipart/form-data", ""):
            status, answer, _ = await hook.send(path, event(), headers={"Content-Type": content_type})
            assert (status, answer["error"]["code"]) == (415, "not_json_content")
    status, _, _ = await hook.send(body=event(), headers={"Content-Type": "application/json; charset=utf-8"})
    assert status == 202


@SQLITE
async def test_a_compressed_body_is_a_415(hook: Listening) -> None:
    """Whether it is sound or not: nothing is unfolded to find out."""
    for data in (gzip.compress(json.dumps(event()).encode()), b"no gzip at all"):
        for path in PATHS:
            status, answer, _ = await hook.send(path, data, headers={"Content-Encoding": "gzip"})
            assert (status, answer["error"]["code"]) == (415, "encoded")
    assert await hook.kept() == (0, 0)


@SQLITE
async def test_a_body_may_be_as_large_as_allowed_and_no_larger(hook: Listening) -> None:
    """The last byte counts, with a length and without one."""
    fits = json.dumps(event()).encode().ljust(MAX)
    assert len(fits) == MAX

    async def chunks(data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), 500):
            yield data[start : start + 500]

    for body, expected in ((fits, 202), (fits + b" ", 413)):
        for path in AMPLIFY_PATHS:
            status, answer, _ = await hook.send(path, body)
            assert status == expected
        status, answer, _ = await hook.send(data=chunks(body))
        assert status == expected
    assert answer["error"]["code"] == "too_large"
    assert str(MAX) in answer["error"]["message"]


@SQLITE
async def test_a_length_that_is_too_large_is_refused_before_the_body_is_read(hook: Listening) -> None:
    """Only the headers are sent, and the answer comes."""
    for path in PATHS:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {SECRET}\r\n"
            f"Content-Type: application/json\r\nContent-Length: 10000000000\r\n\r\n"
        )
        assert (await hook.raw(head.encode())).startswith(b"HTTP/1.1 413 ")


@SQLITE
async def test_nobody_unknown_is_told_anything_about_the_body(hook: Listening) -> None:
    """401 comes before 413, 415 and 400, and before the body is read."""
    head = b"POST /webhooks/amplify HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n"
    assert (await hook.raw(head)).startswith(b"HTTP/1.1 401 ")
    status, answer, _ = await hook.send(body=b"{", headers={"Authorization": "wrong", "Content-Type": "x/y"})
    assert (status, answer["error"]["code"]) == (401, "unauthorized")
    assert SECRET not in json.dumps(answer)
    assert await hook.kept() == (0, 0)


def basic(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


HEADER = "header:Authorization"
AUTHENTICATIONS: list[tuple[str, str, list[dict[str, str]], list[dict[str, str]]]] = [
    (
        HEADER,
        "one two",  # while rotating
        [
            {"Authorization": "one"},
            {"Authorization": "two"},
            {"Authorization": "Bearer one"},
            {"Authorization": "bearer  two "},
        ],
        [
            {},
            {"Authorization": ""},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer "},
            {"Authorization": "three"},
            {"Authorization": "one two"},
            {"Authorization": "On"},
            {"Authorization": "ONE"},
            {"Authorization": "é"},
            {"X-Authorization": "one"},
        ],
    ),
    (
        HEADER,
        "Bearer one",
        [{"Authorization": "Bearer one"}, {"Authorization": "one"}],
        [{"Authorization": "Bearer"}],
    ),
    ("header:x-api-key", "one", [{"X-Api-Key": "one"}], [{"Authorization": "one"}, {"x-api-key": "tw"}]),
    (
        "basic",
        "amplify:one",
        [
            {"Authorization": f"Basic {basic('amplify:one')}"},
            {"Authorization": f"basic {basic('amplify:one')}"},
        ],
        [
            {},
            {"Authorization": "Basic"},
            {"Authorization": "Basic é"},
            {"Authorization": "Basic !!"},
            {"Authorization": f"Basic {basic('amplify:two')}"},
            {"Authorization": f"Bearer {basic('amplify:one')}"},
            {"Authorization": "amplify:one"},
        ],
    ),
]


@SQLITE
@pytest.mark.parametrize(("auth", "secrets", "good", "bad"), AUTHENTICATIONS)
async def test_the_secret_in_a_header(
    store: Store,
    clock: ManualClock,
    auth: str,
    secrets: str,
    good: list[dict[str, str]],
    bad: list[dict[str, str]],
) -> None:
    """What is valid is taken on every path; what is missing, wrong or empty is a 401 and leaves nothing."""
    async with listening(store, clock, auth, secrets) as hook:
        nothing: dict[str, Any] = {"Authorization": None}
        for headers in bad:
            for path in PATHS:
                status, answer, _ = await hook.send(path, event(), headers=nothing | headers)
                assert (status, answer["error"]["code"]) == (401, "unauthorized"), headers
        assert await hook.kept() == (0, 0)
        for headers in good:
            for path in AMPLIFY_PATHS:
                assert (await hook.send(path, event(), headers=nothing | headers))[0] == 202, headers
            assert (await hook.send(PATHS[3], NOTIFICATION, headers=nothing | headers))[0] == 202


@SQLITE
async def test_the_secret_in_the_query_and_none_at_all(store: Store, clock: ManualClock) -> None:
    """`query:NAME` looks in the URL; `none` believes everybody (loopback only, says the configuration)."""
    nothing = {"Authorization": None}
    async with listening(store, clock, "query:key", "one") as hook:
        for query, expected in (("key=one", 202), ("key=two", 401), ("key=", 401), ("", 401), ("k=one", 401)):
            status, _, _ = await hook.send(f"{PATHS[0]}?{query}", event(), headers=nothing)
            assert status == expected, query
    async with listening(store, clock, "none", "") as hook:
        assert (await hook.send(body=event(2), headers=nothing))[0] == 202


@pytest.mark.parametrize("secrets", ["", "  ", "Bearer", "basic Bearer"])
def test_a_scheme_word_alone_is_no_secret(secrets: str) -> None:
    """Whoever forgot the value behind Bearer is told at the start, and does not run open to all."""
    with pytest.raises(ValueError, match=r"webhooks\.secret"):
        Authenticator(HEADER, secrets)


def signature(
    body: bytes, clock: ManualClock, *secrets: str, age: timedelta = timedelta(0), ms: bool = True
) -> str:
    stamp = str(int((clock.now() - age).timestamp() * (1000 if ms else 1)))
    signed = [
        hmac.new(key.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest() for key in secrets
    ]
    return ",".join([stamp, *signed])


@SQLITE
async def test_recurlys_signature(store: Store, clock: ManualClock) -> None:
    """Right, rotated and in either unit it is taken; wrong, old, early or of another body it is not."""
    body = json.dumps(NOTIFICATION).encode()
    minute = timedelta(minutes=1)
    right = signature(body, clock, "one")
    good = [
        right,
        signature(body, clock, "two"),
        signature(body, clock, "old", "one"),
        signature(body, clock, "one", ms=False),
        signature(body, clock, "one", age=4 * minute),
        right.replace(",", ", "),
    ]
    bad = [
        signature(body, clock, "three"),
        signature(body + b" ", clock, "one"),
        signature(body, clock, "one", age=6 * minute),
        signature(body, clock, "one", age=-6 * minute),
        "",
        "x",
        right.split(",")[0],
        right.split(",")[0] + ",",
        right.split(",")[0] + ",é",
        "9" * 30 + "," + right.split(",")[1],
        "-1," + right.split(",")[1],
        "²," + right.split(",")[1],
    ]
    async with listening(store, clock, secrets="one two") as hook:
        nothing: dict[str, Any] = {"Authorization": None}
        for header in bad:
            status, _, _ = await hook.send(PATHS[3], body, headers=nothing | {"recurly-signature": header})
            assert status == 401, header
        assert await hook.kept() == (0, 0)
        status, _, _ = await hook.send(
            PATHS[3], body, headers={"Authorization": "one", "recurly-signature": "x"}
        )
        assert status == 401, "a wrong signature is not made up for"
        for header in good:
            status, _, _ = await hook.send(PATHS[3], body, headers=nothing | {"recurly-signature": header})
            assert status == 202, header
        assert await hook.kept() == (1, 0)


def test_a_signature_costs_one_digest_for_each_secret_and_is_one_of_few(
    monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    """Whoever sends it may be anybody: a body is hashed once a secret, however many signatures there are."""
    digests: list[bytes] = []
    real = hmac.new

    def counted(key: bytes, message: bytes, how: Any) -> hmac.HMAC:
        digests.append(key)
        return real(key, message, how)

    body = b"x" * 65_536
    stamp, right = signature(body, clock, "one").split(",")
    monkeypatch.setattr(hmac, "new", counted)
    judge = Authenticator(HEADER, "one two")
    wrong = "0" * 64
    assert judge.signed(body, ",".join([stamp, *[wrong] * (SIGNATURES_MAX - 1), right]), now=clock.now())
    assert digests == [b"one", b"two"]
    assert not judge.signed(body, ",".join([stamp, *[wrong] * 100]), now=clock.now())
    assert not judge.signed(body, ",".join([stamp, right, *["a"] * SIGNATURES_MAX]), now=clock.now())
    assert len(digests) == 2, "so many are not looked at"
    assert judge.signed(body, f"{stamp},a,{right}", now=clock.now())


async def test_events_that_are_none_of_our_business_lead_to_nothing(hook: Listening) -> None:
    """Other kinds, drafts, steps of a subscription that ask for nothing: accepted, with no action."""
    nothing = [
        event(1, "Product"),
        event(2, "Asset", "ResourceCreated"),
        event(3, state="draft"),
        event(4, "Subscription", "ResourceCreated"),
        event(5, "Subscription") | {"metadata": {"subresource": "status"}},
        event(6, "Subscription") | {"metadata": {"subresource": "marketplace"}},
        event(7, "Quota", "ResourceCreated"),
        event(8, "Subscription", metadata={"id": None}) | {"metadata": {"subresource": "approval"}},
    ]
    for body in nothing:
        status, answer, _ = await hook.send(body=body)
        assert (status, answer["actions"]) == (202, 0), body
    assert await hook.kept() == (len(nothing), 0)
    assert not hook.woken.is_set()


async def test_events_of_our_own_writes_lead_to_nothing_and_no_other_does_so(hook: Listening) -> None:
    """The version we wrote is known. A subresource may share its number with ours: that is not our event."""
    await link(hook.store, plan=replace(PLAN, resource_version=None))
    async with hook.store.write() as tx:
        await links.plan_written(tx, "p1", "7")
    cases = [
        (event(1, type_="ResourceUpdated"), 0),
        (event(2, type_="ResourceUpdated", metadata={"resourceVersion": "8"}), 1),
        (event(3, type_="ResourceUpdated", metadata={"id": "p2"}), 1),
        (event(4, state="archived"), 1),
        (event(5, type_="ResourceDeleted"), 1),
    ]
    for body, actions in cases:
        _, answer, _ = await hook.send(body=body)
        assert answer["actions"] == actions, body


async def test_a_damaged_store_is_a_503(hook: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot commit either; nothing else may be answered."""

    def damaged() -> Tx:
        raise StoreDamaged("the store is damaged")

    monkeypatch.setattr(hook.store, "write", damaged)
    status, answer, headers = await hook.send(body=event())
    assert (status, answer["error"]["code"]) == (503, "store_unavailable")
    assert int(headers["Retry-After"]) > 0

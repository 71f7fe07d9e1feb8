"""Every parser that meets the outside: whatever comes, a value or a typed error, never anything else."""

import asyncio
import json
import os
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import recurly
from amplify_bench import sample
from hypothesis import given, settings
from hypothesis import strategies as st
from test_amplify_sources import HOUR, START
from test_recurly_reading import add_on, plan, subscription
from weird import EXAMPLES, TEXTS, leaves, mutated, nothing_but, values

from billingd import systemd
from billingd.adapters.amplify import answers, resources, traffic_source
from billingd.adapters.amplify.encoding import decode, encode, retry_after
from billingd.adapters.amplify.listing import Page
from billingd.adapters.amplify.token import login_refused, token_from
from billingd.adapters.recurly import outcomes, reading
from billingd.domain.errors import BillingdError, Permanent, Rejected
from billingd.domain.events import Event, actions_for, parse_amplify, parse_feed, parse_recurly
from billingd.settings import ConfigurationError, host_port, load, parse_duration
from billingd.settings.values import format_duration, safe_url
from billingd.throttle import source_of
from billingd.webhooks import Authenticator


class Far:
    """Amplify, with one answer to every question."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def ask_traceability(
        self, path: str, *, params: Sequence[tuple[str, str]] = (), body: Mapping[str, object] | None = None
    ) -> Any:
        return self._answer


NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
fuzzed = settings(max_examples=EXAMPLES)

EVENT: dict[str, Any] = {
    "id": "e1",
    "time": "2026-03-02T11:00:02.417+0000",
    "type": "SubResourceUpdated",
    "correlationId": "c1",
    "metadata": {"subresource": "approval", "sequenceID": "7", "watchTopicID": "w1"},
    "payload": {
        "kind": "Subscription",
        "name": "acme",
        "metadata": {
            "id": "s1",
            "resourceVersion": "3",
            "state": "ACTIVE",
            "scope": {"kind": "ProductPlan", "name": "metered"},
            "selfLink": "/catalog/v1/productplans/metered/quotas/calls",
        },
        "state": {"name": "active"},
        "attributes": {"billingSystem": "recurly"},
        "approval": {"state": "approved"},
    },
}
NOTIFICATION = {"id": "r1", "object_type": "subscription", "event_type": "updated", "uuid": "u1"}


def text_of(document: Any) -> bytes:
    """A document as it would come over the wire."""
    return encode(document).encode("utf-8", errors="surrogatepass")


def kept(event: Event) -> None:
    """What both databases can keep, and what follows from it."""
    for value in (event.id, event.name, event.kind, event.resource_id, event.subresource, event.scope_name):
        if value is not None:
            assert 1 <= len(value.encode()) <= 400
            assert "\x00" not in value
    if event.happened_at is not None:
        assert event.happened_at.tzinfo is not None
    actions_for(event)


@fuzzed
@given(st.binary(max_size=300) | mutated(EVENT).map(text_of))
def test_a_webhooks_body(body: bytes) -> None:
    nothing_but(lambda: kept(parse_amplify(body)), Rejected)


@fuzzed
@given(st.binary(max_size=300) | mutated(NOTIFICATION).map(text_of), st.none() | st.text(max_size=120))
def test_a_recurly_webhooks_body(body: bytes, notification: str | None) -> None:
    nothing_but(lambda: kept(parse_recurly(body, notification)), Rejected)


@fuzzed
@given(mutated(EVENT))
def test_a_feed_item(item: Any) -> None:
    nothing_but(lambda: kept(parse_feed(item)[1]), Rejected)


@fuzzed
@given(
    st.text(max_size=80) | st.from_regex(r"[0-9]{1,14},[0-9a-f,]{0,70}", fullmatch=True),
    st.binary(max_size=9),
)
def test_a_recurly_signature(header: str, body: bytes) -> None:
    assert Authenticator("none", "secret").signed(body, header, now=NOW) is False


@fuzzed
@given(st.text(max_size=60))
def test_a_senders_address(peer: str) -> None:
    assert source_of(peer)


READERS: list[tuple[Callable[[Any], object], str]] = [
    (resources.product, "product"),
    (resources.product_plan, "product_plan"),
    (resources.quota, "quota"),
    (resources.subscription, "subscription_pending"),
    (resources.subscription, "subscription_migrated"),
    (resources.person, "user"),
    (resources.created_at, "product"),
    (resources.marketplace, "product"),
]


@pytest.mark.parametrize(("read", "name"), READERS)
@settings(max_examples=EXAMPLES)
@given(st.data())
def test_an_amplify_resource(read: Callable[[Any], object], name: str, data: st.DataObject) -> None:
    raw = data.draw(mutated(decode(sample(f"{name}.json"))))
    nothing_but(lambda: read(raw), Permanent)
    nothing_but(lambda: Page.of("things", [raw], data.draw(st.none() | st.sampled_from(TEXTS))), Permanent)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("metrics", "chart_grouped_by"),
        ("summary", "summary"),
        ("search", "search_bare"),
        ("search", "search_wrapped"),
    ],
)
@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_traffic_answer(source: Any, name: str, data: st.DataObject) -> None:
    answer = data.draw(mutated(decode(sample(f"{name}.json"))))
    reader = traffic_source(source, Far(answer), "total")

    def read() -> None:
        got = asyncio.run(
            reader.read(
                organizations={"o1", ""},
                units={"transactions"},
                subscriptions={"s1"},
                quotas={"q1"},
                start=START,
                end=START + 3 * HOUR,
                length=HOUR,
            )
        )
        assert all(one.units > 0 for one in got)

    nothing_but(read, BillingdError)


@fuzzed
@given(
    st.binary(max_size=200) | values.map(text_of), st.integers(200, 599), st.sampled_from(TEXTS) | st.text()
)
def test_amplifys_answers_of_any_status(body: bytes, status: int, header: str) -> None:
    call = answers.Call("PUT", "https://x/", "a write", writes=True, platform=True)
    reply = answers.Reply(status, {"Retry-After": header}, body)
    nothing_but(lambda: answers.json_of(call, reply), BillingdError)
    assert isinstance(answers.error_for(call, answers.true_status(reply), NOW), BillingdError)
    nothing_but(lambda: token_from(answers.lenient(body), NOW), BillingdError)
    assert isinstance(login_refused(status, answers.lenient(body)), BillingdError)
    wish = retry_after(header, NOW)
    assert wish is None or timedelta(0) <= wish <= timedelta(days=1)


@fuzzed
@given(mutated({"access_token": "t", "expires_in": 300}))
def test_amplifys_token(answer: Any) -> None:
    nothing_but(lambda: token_from(answer, NOW), BillingdError)


def _usd(resource: object) -> object:
    return reading.add_on(resource, "USD")


RECURLY: list[tuple[Callable[[Any], object], dict[str, Any]]] = [
    (reading.plan, plan()),
    (_usd, add_on()),
    (reading.subscription, subscription()),
    (reading.attached, subscription()),
    (
        reading.usage,
        {"object": "usage", "id": "u1", "amount": 4.0, "usage_timestamp": "2026-11-01T00:00:00Z"},
    ),
    (reading.account, {"object": "account", "id": "a1", "code": "amplify-org-1", "state": "active"}),
    (
        reading.line_dates,
        {"object": "line_item", "id": "l1", "start_date": "2026-11-01T00:00:00Z", "end_date": None},
    ),
    (reading.charged_start, {"object": "line_item", "origin": "plan", "type": "charge", "subtotal": 1.5}),
]


@pytest.mark.parametrize(("read", "document"), RECURLY)
@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_recurly_resource(
    read: Callable[[Any], object], document: dict[str, Any], data: st.DataObject
) -> None:
    """As the SDK makes it of an answer; what the SDK itself cannot stomach is told as no usable answer."""
    plain = leaves.filter(lambda leaf: not isinstance(leaf, Decimal)) | st.floats()
    raw = data.draw(mutated(document, of=plain | st.lists(plain, max_size=2)))
    try:
        resource = recurly.Resource.cast_json(raw)
    except Exception:
        return
    nothing_but(lambda: read(resource), reading.Unreadable, ArithmeticError)
    reading.subscription_if_readable(resource)


HEADERS = ["retry-after", "x-ratelimit-reset", "date", "x-request-id", "idempotency-prior"]


@fuzzed
@given(
    st.dictionaries(st.sampled_from(HEADERS), st.sampled_from(TEXTS) | st.text(max_size=30)),
    st.none() | st.integers(200, 599),
    st.booleans(),
)
def test_recurlys_answers_of_any_status(headers: dict[str, str], status: int | None, left: bool) -> None:
    answer: outcomes.Answer[None] = outcomes.Answer(fault="broken", status=status, headers=headers, left=left)
    for judge in (outcomes.write_error, outcomes.read_error):
        assert isinstance(judge("a call", answer, NOW), BillingdError)
    outcomes.date_of(answer)
    wait = outcomes.retry_after(answer, now=NOW)
    assert wait is None or timedelta(0) <= wait <= outcomes.RETRY_AFTER_MAX


@fuzzed
@given(st.sampled_from(TEXTS) | st.text() | st.from_regex(r"[0-9]{1,12}(ms|s|m|h|d)", fullmatch=True))
def test_a_duration(text: str) -> None:
    def both_ways() -> None:
        assert parse_duration(format_duration(parse_duration(text))) == parse_duration(text)

    nothing_but(both_ways, ValueError)


@fuzzed
@given(st.text() | st.from_regex(r"\[?[0-9a-f.:]{0,20}\]?:[0-9]{0,7}", fullmatch=True))
def test_an_address_or_url(text: str) -> None:
    nothing_but(lambda: host_port(text), ValueError)
    nothing_but(lambda: safe_url(text), ValueError)
    nothing_but(lambda: safe_url(f"https://{text}"), ValueError)


CONFIGURATION = {
    "amplify": {"region": "us", "central_url": "https://x", "timeout": "20s", "organization_id": "1"},
    "recurly": {"base_url": "http://127.0.0.1:1", "requests_per_minute": 300, "settling": "60s"},
    "webhooks": {
        "listen": "127.0.0.1:8080",
        "auth": "basic",
        "body_bytes_max": 5,
        "tls_cert": "",
        "tls_key": "",
    },
    "admin": {"listen": "unix:/run/x"},
    "store": {"url": "sqlite+aiosqlite:////x.db", "keep_done": "1d"},
    "traffic": {"source": "metrics", "window": "1h", "schedule": "7 * * * *", "billable": "total"},
    "outbox": {"workers": 8, "backoff": "2s"},
    "notifications": {"provider": ["json://x"], "subscriber": ""},
}


def toml(document: Any) -> str:
    """A document as TOML, as far as TOML can say it."""
    if not isinstance(document, dict):
        return f"x = {json.dumps(document, default=str)}"
    lines = [
        f"{json.dumps(key)} = {inline(value)}"
        for key, value in document.items()
        if not isinstance(value, dict)
    ]
    for key, table in document.items():
        if isinstance(table, dict):
            lines += [f"[{json.dumps(key)}]", *(f"{json.dumps(k)} = {inline(v)}" for k, v in table.items())]
    return "\n".join(lines)


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return str(value).lower() if isinstance(value, bool | int) else json.dumps(str(value))


@fuzzed
@given(mutated(CONFIGURATION), st.binary(max_size=60), st.booleans())
def test_a_configuration_file(
    tmp_path_factory: pytest.TempPathFactory, document: Any, noise: bytes, raw: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    text = toml(document).encode(errors="replace")
    file.write_bytes(noise + text if raw else text)
    nothing_but(lambda: load(file, {}), ConfigurationError)
    assert tomllib


NAMES = [
    "BILLINGD_RECURLY__API_KEY",
    "BILLINGD_OUTBOX__WORKERS",
    "BILLINGD_NOTIFICATIONS__PROVIDER",
    "BILLINGD_X__Y",
]
NAMES += [
    "BILLINGD_OUTBOX",
    "BILLINGD_SECRETS_DIR",
    "CREDENTIALS_DIRECTORY",
    "BILLINGD_TRAFFIC__WINDOW",
    "BILLINGD_",
]


@fuzzed
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(TEXTS) | st.text() | values.map(str)))
def test_a_configuration_in_the_environment(environment: dict[str, str]) -> None:
    nothing_but(lambda: load(Path("/dev/null"), environment), ConfigurationError)


COUNTS = st.sampled_from(["0", "1", "2", "3", "-1", "²", "64", "65", "9" * 30, "", "x"])


@fuzzed
@given(
    st.dictionaries(st.sampled_from(["WATCHDOG_USEC", "WATCHDOG_PID"]), COUNTS | st.text(max_size=5)),
    COUNTS,
    st.none()
    | st.text("webhooksadmin:", max_size=30)
    | st.sampled_from(["webhooks", "admin", "webhooks:admin"]),
    st.sampled_from(["listening", "not listening", "datagram", "file", "closed"]),
)
def test_systemds_environment(watchdog: dict[str, str], count: str, names: str | None, what: str) -> None:
    """On a descriptor that is what it should be, or something else; it is never inherited twice."""
    seconds = systemd.watchdog_seconds(watchdog)
    assert seconds is None or seconds > 0
    first = _descriptor(what)
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    found: dict[str, list[socket.socket]] = {}
    with mock.patch.object(systemd, "FIRST_DESCRIPTOR", first):
        try:
            found = systemd.inherited(environment)
        except systemd.BadEnvironment:
            found = {}
        assert systemd.inherited(environment) == {}
    assert set(found) <= set(systemd.SOCKET_NAMES)
    if found:
        assert what == "listening"
    for one in (one for several in found.values() for one in several):
        assert not one.get_inheritable()
        one.close()
    try:
        os.close(first)
    except OSError:
        return


def _descriptor(what: str) -> int:
    """A descriptor far from all others, so that the next ones are closed."""
    if what == "file":
        made = os.open("/dev/null", os.O_RDONLY)
    else:
        one = socket.socket(type=socket.SOCK_DGRAM if what == "datagram" else socket.SOCK_STREAM)
        if what == "listening":
            one.bind(("127.0.0.1", 0))
            one.listen()
        made = one.detach()
    os.dup2(made, 900)
    os.close(made)
    if what == "closed":
        os.close(900)
    return 900


def test_sockets_of_another_process_are_left_alone() -> None:
    """LISTEN_PID says whom they are for."""
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}
    assert systemd.inherited(environment) == {}
    assert environment

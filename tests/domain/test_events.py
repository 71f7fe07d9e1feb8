"""Webhook bytes -> Event -> Actions; whatever comes in, only Rejected goes out."""

import contextlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.errors import Rejected
from billingd.domain.events import (
    PROVISION_PLAN,
    PROVISION_PRODUCT,
    PROVISION_SUBSCRIPTION,
    REFRESH_SUBSCRIPTION,
    Event,
    actions_for,
    parse_amplify,
    parse_feed,
    parse_recurly,
)


def amplify(**changes: Any) -> bytes:
    """An event of a subscription whose approval is pending, as in amplify.md 4.1."""
    document: dict[str, Any] = {
        "id": "5e5e0000-0000-4000-8000-000000000001",
        "time": "2026-03-02T11:00:02.417+0000",
        "version": "v1",
        "product": "AmplifyCentral",
        "correlationId": "6f6f",
        "organization": {"id": "100000000000001"},
        "type": "SubResourceUpdated",
        "payload": {
            "kind": "Subscription",
            "name": "weather-pro-acme",
            "metadata": {"id": "8ac9dd00", "resourceVersion": "3"},
            "approval": {"state": "pending"},
        },
        "metadata": {"subresource": "approval"},
    }
    return json.dumps(document | changes).encode()


def payload(**changes: Any) -> bytes:
    return amplify(payload=json.loads(amplify())["payload"] | changes)


def test_what_is_taken_from_an_event() -> None:
    """The resource and what happened to it; of the payload only what says so."""
    assert parse_amplify(amplify()) == Event(
        source="amplify",
        id="5e5e0000-0000-4000-8000-000000000001",
        type="SubResourceUpdated",
        kind="Subscription",
        name="weather-pro-acme",
        resource_id="8ac9dd00",
        subresource="approval",
        resource_version="3",
        scope_name=None,
        state=None,
        deleting=False,
        correlation_id="6f6f",
        happened_at=datetime(2026, 3, 2, 11, 0, 2, 417_000, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        (payload(state="active"), "state", "active"),  # of a plan
        (payload(state={"name": "archived"}), "state", "archived"),  # of a subscription
        (payload(state=7), "state", None),
        (payload(metadata={"id": "x", "state": "DELETING"}), "deleting", True),
        (payload(metadata={"scope": {"kind": "ProductPlan", "name": "gold"}}), "scope_name", "gold"),
        (payload(metadata={"scope": "gold"}), "scope_name", None),
        (payload(metadata=None), "resource_id", None),
        (payload(metadata={"id": 7}), "resource_id", None),
        (payload(metadata={"id": "x" * 65}), "resource_id", None),
        (payload(metadata={"id": "a\x00b"}), "resource_id", None),
        (payload(metadata={"id": "\udc80"}), "resource_id", None),
        (amplify(metadata=None), "subresource", None),
        (amplify(metadata={"subresource": None}), "subresource", None),
        (amplify(correlationId=["x"]), "correlation_id", None),
        (amplify(id="x" * 100), "id", "x" * 100),
        (amplify(time=None), "happened_at", None),
        (amplify(time="yesterday"), "happened_at", None),
        (amplify(time="0001-01-01T00:00:00+1400"), "happened_at", None),
        (amplify(time="2026-03-02T12:00:02+01:00"), "happened_at", datetime(2026, 3, 2, 11, 0, 2, 0, UTC)),
        (payload(name="💶" * 100), "name", "💶" * 100),
        (b"\xef\xbb\xbf" + amplify(), "kind", "Subscription"),
        (amplify().decode().encode("utf-16"), "kind", "Subscription"),
    ],
)
def test_what_may_be_missing_or_odd(body: bytes, field: str, value: Any) -> None:
    """A part that is no use is left out; the event stays an event."""
    assert getattr(parse_amplify(body), field) == value


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "not_json"),
        (b"\xff", "not_json"),
        (b"{", "not_json"),
        (b"[" * 100_000, "not_json"),
        (b"9" * 10_000, "not_json"),
        (b"[]", "not_an_event"),
        (b'"x"', "not_an_event"),
        (b"null", "not_an_event"),
        (amplify(id=None), "not_an_event"),
        (amplify(id=""), "not_an_event"),
        (amplify(id=1), "not_an_event"),
        (amplify(id="x" * 101), "not_an_event"),
        (amplify(id="\x00"), "not_an_event"),
        (amplify(id="\ud800"), "not_an_event"),
        (amplify(type=None), "not_an_event"),
        (amplify(type="ResourceEaten"), "not_an_event"),
        (amplify(type=[]), "not_an_event"),
        (amplify(type={}), "not_an_event"),
        (amplify(payload=None), "not_an_event"),
        (amplify(payload="x"), "not_an_event"),
        (payload(kind=None), "not_an_event"),
        (payload(name=""), "not_an_event"),
        (payload(name="n" * 101), "not_an_event"),
        (payload(name={"a": 1}), "not_an_event"),
    ],
)
def test_what_is_no_event(body: bytes, code: str) -> None:
    """400, with a code for machines and a sentence for people."""
    with pytest.raises(Rejected) as caught:
        parse_amplify(body)
    assert (caught.value.status, caught.value.code) == (400, code)
    assert str(caught.value)


RECURLY = {"id": "r1", "object_type": "invoice", "event_type": "paid", "uuid": "u1", "site_id": "s"}


def test_a_notification_of_recurly() -> None:
    """Known by the header that stays the same across retries, else by its bytes."""
    body = json.dumps(RECURLY).encode()
    event = parse_recurly(body, "n1")
    assert (event.source, event.id, event.kind, event.type, event.name, event.resource_id) == (
        "recurly",
        "n1",
        "invoice",
        "paid",
        "u1",
        "r1",
    )
    assert parse_recurly(body, None).id == parse_recurly(body, "").id != parse_recurly(body + b" ", None).id
    assert parse_recurly(body, "x" * 101).id == parse_recurly(body, None).id
    assert parse_recurly(json.dumps(RECURLY | {"uuid": None}).encode(), None).name == "r1"
    assert actions_for(event) == ()


@pytest.mark.parametrize("event_type", ["renewal.scheduled", "updated", "paused", "expired"])
def test_whatever_happens_to_a_subscription_at_recurly_it_is_looked_at_again(event_type: str) -> None:
    """Once for each notification; all of one subscription one after the other."""
    body = json.dumps(RECURLY | {"object_type": "subscription", "event_type": event_type}).encode()
    [action] = actions_for(parse_recurly(body, "n1"))
    assert (action.kind, action.subject, action.args) == (REFRESH_SUBSCRIPTION, "refresh:u1", {"uuid": "u1"})
    [again] = actions_for(parse_recurly(body, "n2"))
    assert (again.key != action.key, again.subject) == (True, action.subject)


@pytest.mark.parametrize("change", [{"event_type": None}, {"object_type": 7}, {"uuid": None, "id": None}])
def test_what_is_no_notification(change: dict[str, Any]) -> None:
    """400 as well."""
    with pytest.raises(Rejected) as caught:
        parse_recurly(json.dumps(RECURLY | change).encode(), "n1")
    assert caught.value.status == 400


PRODUCT = [(PROVISION_PRODUCT, "product:weather-pro-acme")]
PLAN = [(PROVISION_PLAN, "plan:weather-pro-acme")]
SUBSCRIPTION = [(PROVISION_SUBSCRIPTION, "subscription:8ac9dd00")]


@pytest.mark.parametrize(
    ("kind", "type_", "subresource", "state", "asked"),
    [
        ("ProductPlan", "SubResourceUpdated", "state", "active", PLAN),
        ("ProductPlan", "SubResourceUpdated", "state", "deprecated", PLAN),
        ("ProductPlan", "SubResourceUpdated", "state", "archived", PLAN),
        ("ProductPlan", "ResourceUpdated", None, "active", PLAN),
        ("ProductPlan", "ResourceCreated", None, "draft", []),
        ("ProductPlan", "ResourceUpdated", None, "draft", []),
        ("ProductPlan", "ResourceDeleted", None, "draft", PLAN),
        ("ProductPlan", "ResourceDeleted", None, None, PLAN),
        ("Subscription", "ResourceCreated", None, None, []),
        ("Subscription", "ResourceUpdated", None, None, []),
        ("Subscription", "SubResourceUpdated", "status", None, []),
        ("Subscription", "SubResourceUpdated", "marketplace", None, []),
        ("Subscription", "SubResourceUpdated", "approval", None, SUBSCRIPTION),
        ("Subscription", "SubResourceUpdated", "state", {"name": "archived"}, SUBSCRIPTION),
        ("Subscription", "ResourceDeleted", None, None, SUBSCRIPTION),
        ("Product", "ResourceCreated", None, None, PRODUCT),
        ("Product", "ResourceUpdated", None, None, PRODUCT),
        ("Product", "ResourceDeleted", None, None, PRODUCT),
        ("Product", "SubResourceUpdated", "state", "active", []),
        ("Quota", "ResourceCreated", None, None, []),
        ("AssetRequest", "SubResourceUpdated", "approval", None, []),
    ],
)
def test_what_each_event_asks_for(
    kind: str, type_: str, subresource: str | None, state: Any, asked: list[tuple[str, str]]
) -> None:
    """The table of amplify.md 4.2."""
    body = amplify(
        type=type_,
        metadata={} if subresource is None else {"subresource": subresource},
        payload=json.loads(amplify())["payload"] | {"kind": kind, "state": state},
    )
    assert [(action.kind, action.subject) for action in actions_for(parse_amplify(body))] == asked


def test_a_quota_asks_for_its_plan() -> None:
    """An active plan may gain one; the quota's event knows only the plan's name."""
    metadata = {"id": "q", "scope": {"kind": "ProductPlan", "name": "gold"}}
    [action] = actions_for(parse_amplify(payload(kind="Quota", metadata=metadata)))
    assert (action.kind, action.subject, action.args) == (
        PROVISION_PLAN,
        "plan:gold",
        {"name": "gold", "id": None},
    )


def test_a_subscription_that_is_being_deleted_asks_whatever_the_event() -> None:
    """With a finalizer a delete shows as an update first (amplify.md 2.7)."""
    body = amplify(
        type="ResourceUpdated",
        metadata={},
        payload={"kind": "Subscription", "name": "n", "metadata": {"id": "s", "state": "DELETING"}},
    )
    assert len(actions_for(parse_amplify(body))) == 1


def test_each_event_asks_under_a_key_of_its_own() -> None:
    """A later event of the same resource is not taken for the earlier one; the same event is."""
    first, again, later = (parse_amplify(amplify(id=id_)) for id_ in ("a", "a", "b"))
    assert actions_for(first) == actions_for(again)
    assert actions_for(first)[0].key != actions_for(later)[0].key


def _fits(event: Event) -> None:
    """What the tables hold of it, in both databases."""
    for text, most in (
        (event.id, 100),
        (event.type, 100),
        (event.kind, 100),
        (event.name, 100),
        (event.resource_id, 64),
        (event.subresource, 64),
        (event.correlation_id, 100),
    ):
        if text is not None:
            assert 0 < len(text) <= most
            assert "\x00" not in text
            text.encode()
    for action in actions_for(event):
        assert len(action.subject) <= 200
        assert len(action.key) <= 300
        json.dumps(action.args).encode()


def _parses(body: bytes, notification_id: str | None = None) -> None:
    for parse in (parse_amplify, lambda raw: parse_recurly(raw, notification_id)):
        with contextlib.suppress(Rejected):
            _fits(parse(body))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=200), st.none() | st.text(max_size=120))
def test_any_bytes_at_all(body: bytes, notification_id: str | None) -> None:
    """Rejected or a fitting event, never anything else."""
    _parses(body, notification_id)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id": ANY_JSON,
            "type": ANY_JSON | st.just("ResourceUpdated"),
            "metadata": ANY_JSON,
            "correlationId": ANY_JSON,
            "event_type": ANY_JSON,
            "object_type": ANY_JSON,
            "uuid": ANY_JSON,
            "payload": ANY_JSON
            | st.fixed_dictionaries(
                {},
                optional={
                    "kind": st.sampled_from(["ProductPlan", "Quota", "Subscription"]) | ANY_JSON,
                    "name": ANY_JSON | st.just("n"),
                    "state": ANY_JSON,
                    "metadata": ANY_JSON
                    | st.fixed_dictionaries(
                        {}, optional={"id": ANY_JSON, "scope": ANY_JSON, "state": ANY_JSON}
                    ),
                },
            ),
        },
    )
)
def test_any_json_in_the_place_of_any_field(document: dict[str, Any]) -> None:
    """Nothing in an event can break more than itself."""
    _parses(json.dumps(document).encode())
    _parses(json.dumps(json.loads(amplify()) | document).encode())


def feed_item(sequence: Any = 41207, **changes: Any) -> dict[str, Any]:
    """The same event as the feed shows it (amplify.md 4.5): no spec, no subresources, its own time format."""
    document: dict[str, Any] = json.loads(amplify())
    document["payload"] = {
        "group": "catalog",
        "kind": "Subscription",
        "name": "weather-pro-acme",
        "attributes": {},
        "finalizers": None,
        "metadata": {"id": "8ac9dd00", "selfLink": "/catalog/v1/subscriptions/weather-pro-acme"},
    }
    document["time"] = "2026-03-02 11:00:02.417551"
    document["metadata"] = {"watchTopicID": "8ac9ff00", "sequenceID": sequence, "subresource": "approval"}
    return document | changes


def test_a_feed_item_is_the_webhook_s_event() -> None:
    """The same id, so that it is taken once; what its payload leaves out is not known."""
    sequence, event = parse_feed(feed_item())
    assert sequence == 41207
    webhook = parse_amplify(amplify())
    assert event.id == webhook.id
    assert event.happened_at == datetime(2026, 3, 2, 11, 0, 2, 417_551, UTC)
    assert event.resource_version is None
    assert actions_for(event) == actions_for(webhook)


@pytest.mark.parametrize(
    "item",
    [
        *(feed_item(sequence) for sequence in (None, 0, -1, True, "x", 2**63, 1.5, [1], "9" * 20)),
        feed_item() | {"metadata": None},
        feed_item() | {"type": "UPDATED"},
        feed_item() | {"payload": []},
        feed_item() | {"id": ""},
        None,
        7,
        [],
    ],
)
def test_an_item_that_is_no_event_is_rejected(item: Any) -> None:
    """Whatever it is: the feed goes on behind it."""
    with pytest.raises(Rejected):
        parse_feed(item)


@pytest.mark.parametrize(
    ("kind", "type_", "subresource", "asked"),
    [
        ("ProductPlan", "SubResourceUpdated", "state", PLAN),
        ("ProductPlan", "ResourceCreated", None, PLAN),  # it may be no draft any more
        ("Subscription", "ResourceCreated", None, SUBSCRIPTION),  # it may be approved from the first
        ("Subscription", "SubResourceUpdated", "approval", SUBSCRIPTION),
        ("Subscription", "SubResourceUpdated", "state", SUBSCRIPTION),
        ("Subscription", "SubResourceUpdated", "status", []),
        ("Subscription", "ResourceDeleted", None, SUBSCRIPTION),
        ("Product", "ResourceUpdated", None, PRODUCT),
        ("Product", "SubResourceUpdated", "status", []),
    ],
)
def test_what_an_event_of_the_feed_asks_for(
    kind: str, type_: str, subresource: str | None, asked: list[tuple[str, str]]
) -> None:
    """Where a webhook would tell that nothing is to do, the feed does not, and the handler looks."""
    item = feed_item(type=type_)
    item["payload"]["kind"] = kind
    item["metadata"]["subresource"] = subresource
    _, event = parse_feed(item)
    assert event.labelled is None
    assert [(action.kind, action.subject) for action in actions_for(event)] == asked


@pytest.mark.parametrize(
    ("metadata", "plan"),
    [
        ({"scope": {"kind": "ProductPlan", "name": "gold"}}, "gold"),
        ({"selfLink": "/catalog/v1/productplans/gold/quotas/calls"}, "gold"),
        ({"selfLink": "/catalog/v1/quotas/calls"}, None),
        ({"selfLink": 7}, None),
    ],
)
def test_a_quota_names_its_plan_one_way_or_the_other(metadata: dict[str, Any], plan: str | None) -> None:
    """The feed's payload may have less than the webhook's."""
    item = feed_item(type="ResourceCreated")
    item["payload"] |= {"kind": "Quota", "name": "calls", "metadata": metadata}
    _, event = parse_feed(item)
    expected = [] if plan is None else [(PROVISION_PLAN, f"plan:{plan}")]
    assert [(action.kind, action.subject) for action in actions_for(event)] == expected


@pytest.mark.parametrize(
    ("approval", "asked"),
    [({"state": "approved"}, SUBSCRIPTION), ({"state": "pending"}, []), (None, [])],
)
def test_a_new_subscription_matters_when_it_is_approved_from_the_first(
    approval: Any, asked: list[tuple[str, str]]
) -> None:
    """A migration makes such; of any other the approval's own event comes."""
    document = json.loads(payload(approval=approval)) | {"type": "ResourceCreated", "metadata": {}}
    event = parse_amplify(json.dumps(document).encode())
    assert [(action.kind, action.subject) for action in actions_for(event)] == asked


@pytest.mark.parametrize(
    ("attributes", "type_", "labelled"),
    [
        ({"billingSystem": "recurly"}, "ResourceUpdated", True),
        ({"billingSystem": "stripe"}, "ResourceUpdated", False),
        ({}, "ResourceUpdated", False),
        (None, "ResourceUpdated", False),
        ({"billingSystem": "recurly"}, "ResourceDeleted", None),  # its content is documented nowhere
    ],
)
def test_a_product_s_webhook_tells_its_label(attributes: Any, type_: str, labelled: bool | None) -> None:
    """The whole resource is in it."""
    document = json.loads(payload(kind="Product", attributes=attributes)) | {"type": type_}
    assert parse_amplify(json.dumps(document).encode()).labelled is labelled


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(ANYTHING)
def test_no_item_does_anything_but_be_rejected(part: Any) -> None:
    """Anything in any place."""
    for item in (part, feed_item(part), feed_item(payload=part), feed_item(id=part, type=part)):
        with contextlib.suppress(Rejected):
            actions_for(parse_feed(item)[1])

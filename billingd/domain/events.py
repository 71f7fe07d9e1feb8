"""Webhook bytes or feed item -> Event -> Actions. An event is a hint: handlers read the resource as it is."""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from billingd.domain.attempts import Action
from billingd.domain.catalog import BILLING_SYSTEM
from billingd.domain.errors import Rejected
from billingd.domain.usage import UsageRecord

PROVISION_PRODUCT: Final = "provision_product"
PROVISION_PLAN: Final = "provision_plan"
PROVISION_SUBSCRIPTION: Final = "provision_subscription"
END_SUBSCRIPTION: Final = "end_subscription"
ATTACH_ADD_ONS: Final = "attach_add_ons"
ADOPT_SUBSCRIPTION: Final = "adopt_subscription"
REFRESH_SUBSCRIPTION: Final = "refresh_subscription"
AUDIT_USAGE: Final = "audit_usage"
RESYNC: Final = "resync"
REPORT_USAGE: Final = "report_usage"
REPAIR_USAGE: Final = "repair_usage"

EVENT_TYPES: Final = frozenset(
    {"ResourceCreated", "ResourceUpdated", "ResourceDeleted", "SubResourceUpdated"}
)
NAME_LENGTH_MAX: Final = 100
ID_LENGTH_MAX: Final = 64
SEQUENCE_MAX: Final = 2**63 - 1
_PLAN_OF_A_QUOTA: Final = re.compile(r"/productplans/([^/]+)/quotas/")


@dataclass(frozen=True, slots=True)
class Event:
    """One event, reduced to what is needed: which resource, and what is said to have happened to it."""

    source: str
    id: str
    type: str
    kind: str
    name: str
    resource_id: str | None
    subresource: str | None
    resource_version: str | None
    scope_name: str | None
    """Name of the resource that contains this one (the product plan of a quota)."""
    state: str | None
    """The plan's or subscription's state where the payload carries it."""
    deleting: bool
    correlation_id: str | None
    labelled: bool | None = None
    """Whether a product says that its plans are billed here; None where the payload does not tell."""
    approved: bool | None = None
    """Whether a new subscription is approved from the first; None where the payload does not tell."""
    happened_at: datetime | None = None
    """When it happened, as far as the event tells."""


def _reject(message: str) -> Rejected:
    return Rejected(message, status=400, code="not_an_event")


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Rejected(f"the body is not JSON: {error}", status=400, code="not_json") from error
    if not isinstance(document, dict):
        raise _reject("the body must be a JSON object with id, type and payload")
    return document


def _text(value: Any, where: str, *, length_max: int) -> str:
    text = _optional(value, length_max=length_max)
    if text is None:
        raise _reject(f"{where} must be a text of 1 to {length_max} characters")
    return text


def _optional(value: Any, *, length_max: int = ID_LENGTH_MAX) -> str | None:
    """The text, if it is one that both databases can keep: no NUL, no half of a surrogate pair."""
    if not isinstance(value, str) or not 1 <= len(value) <= length_max:
        return None
    return None if any(c == "\x00" or "\ud800" <= c <= "\udfff" for c in value) else value


def _state(payload: dict[str, Any]) -> str | None:
    """`state` is a plain string on plans and an object with a name on subscriptions (amplify.md 3)."""
    state = payload.get("state")
    return _optional(state.get("name") if isinstance(state, dict) else state)


def _moment(value: Any) -> datetime | None:
    """`2026-03-02T11:00:02.417+0000` in webhooks, `2026-03-02 11:00:02.417551` in the feed (amplify.md 4)."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None  # it only bounds what is known otherwise


def _says(payload: dict[str, Any], part: str, field: str, value: str) -> bool:
    found = payload.get(part)
    return isinstance(found, dict) and found.get(field) == value


def _scope_name(metadata: dict[str, Any]) -> str | None:
    """What contains it, by name; of a quota also from its link, for the feed shows less than a webhook."""
    scope = metadata.get("scope")
    if isinstance(scope, dict):
        return _optional(scope.get("name"), length_max=NAME_LENGTH_MAX)
    link = metadata.get("selfLink")
    found = _PLAN_OF_A_QUOTA.search(link) if isinstance(link, str) else None
    return None if found is None else _optional(found[1], length_max=NAME_LENGTH_MAX)


def parse_amplify(body: bytes) -> Event:
    """The event in an Amplify webhook's body. Raises `Rejected` (400) when it is not one."""
    return _event(_object(body), whole=True)


def parse_feed(item: Any) -> tuple[int, Event]:
    """The sequence number and the event of a watch topic's item. Raises `Rejected` when it is not one.

    Its payload has neither spec nor subresources, and its attributes are not relied on (amplify.md 4.5).
    """
    sequence = sequence_of(item)
    if sequence is None:
        raise _reject("metadata.sequenceID must be a whole number")
    return sequence, _event(item, whole=False)


def sequence_of(item: Any) -> int | None:
    """The sequence number of a watch topic's item, None when it has none."""
    about = item.get("metadata") if isinstance(item, dict) else None
    number = about.get("sequenceID") if isinstance(about, dict) else None
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) <= 19:
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        return None
    return number if 0 < number <= SEQUENCE_MAX else None


def _event(document: dict[str, Any], *, whole: bool) -> Event:
    payload = document.get("payload")
    if not isinstance(payload, dict):
        raise _reject("payload must be an object: the resource that changed")
    event_type = document.get("type")
    if not isinstance(event_type, str) or event_type not in EVENT_TYPES:
        raise _reject(f"type must be one of {', '.join(sorted(EVENT_TYPES))}")
    metadata = payload.get("metadata") if isinstance(payload.get("metadata"), dict) else {}
    about = document.get("metadata") if isinstance(document.get("metadata"), dict) else {}
    assert isinstance(metadata, dict)
    assert isinstance(about, dict)
    whole = whole and event_type != "ResourceDeleted"
    return Event(
        source="amplify",
        id=_text(document.get("id"), "id", length_max=100),
        type=event_type,
        kind=_text(payload.get("kind"), "payload.kind", length_max=NAME_LENGTH_MAX),
        name=_text(payload.get("name"), "payload.name", length_max=NAME_LENGTH_MAX),
        resource_id=_optional(metadata.get("id")),
        subresource=_optional(about.get("subresource")),
        resource_version=_optional(metadata.get("resourceVersion")),
        scope_name=_scope_name(metadata),
        state=_state(payload),
        deleting=metadata.get("state") == "DELETING",
        correlation_id=_optional(document.get("correlationId"), length_max=100),
        labelled=_says(payload, "attributes", "billingSystem", BILLING_SYSTEM)
        if whole and payload.get("kind") == "Product"
        else None,
        approved=_says(payload, "approval", "state", "approved")
        if whole and payload.get("kind") == "Subscription" and event_type == "ResourceCreated"
        else None,
        happened_at=_moment(document.get("time")),
    )


def parse_recurly(body: bytes, notification_id: str | None) -> Event:
    """The event in a Recurly webhook's body (a pointer to an object, see recurly.md 4.10).

    `notification_id` is the header that stays the same across retries; without it the body's digest serves.
    """
    document = _object(body)
    identity = _optional(notification_id, length_max=100) or hashlib.sha256(body).hexdigest()
    return Event(
        source="recurly",
        id=identity,
        type=_text(document.get("event_type"), "event_type", length_max=NAME_LENGTH_MAX),
        kind=_text(document.get("object_type"), "object_type", length_max=NAME_LENGTH_MAX),
        name=_optional(document.get("uuid"), length_max=100)
        or _text(document.get("id"), "id", length_max=100),
        resource_id=_optional(document.get("id")),
        subresource=None,
        resource_version=None,
        scope_name=None,
        state=None,
        deleting=False,
        correlation_id=None,
    )


def actions_for(event: Event) -> tuple[Action, ...]:
    """What an event asks for; nothing when that is known at once.

    A product matters when its label may have changed; a product plan whatever happened to it, once it has
    left the draft; a quota because a plan may gain one; a subscription when its approval or state moved or it
    went (sequence in amplify.md 4.2), and when it came unless it says that it is not approved yet: one that a
    migration made may never be pending. Any event of a Recurly subscription (a renewal that is near, a pause)
    asks to look at it again.
    """
    if event.source == "recurly":
        return (refresh_action(event.name, because=event.id),) if event.kind == "subscription" else ()
    if event.kind == "Product" and event.type != "SubResourceUpdated":
        return (product_action(event.name, event.resource_id, because=event.id),)
    if event.kind == "ProductPlan":
        if event.state == "draft" and event.type != "ResourceDeleted":
            return ()
        return (plan_action(event.name, event.resource_id, because=event.id),)
    if event.kind == "Quota" and event.scope_name is not None:
        return (plan_action(event.scope_name, None, because=event.id),)
    if event.kind == "Subscription" and event.resource_id is not None:
        moved = event.type == "SubResourceUpdated" and event.subresource in {"approval", "state"}
        came = event.type == "ResourceCreated" and event.approved is not False
        if moved or came or event.type == "ResourceDeleted" or event.deleting:
            return (subscription_action(event.name, event.resource_id, because=event.id),)
    return ()


def adopt_action(subscription_id: str, name: str, uuid: str, since: datetime, *, because: str) -> Action:
    """Take over a subscription that another program made at Recurly; its usage counts from `since` on.

    Its subject is its own: `provision_subscription` may be waiting for just that.
    """
    return Action(
        ADOPT_SUBSCRIPTION,
        f"adopt:{subscription_id}",
        f"{ADOPT_SUBSCRIPTION}:{subscription_id}:{because}",
        {"id": subscription_id, "name": name, "uuid": uuid, "since": since.isoformat()},
    )


def attach_action(subscription_id: str, add_on_codes: Collection[str]) -> Action:
    """Put add-ons of its plan on a subscription, which was made before it had them.

    Its subject is its own: while it waits, the subscription may end.
    """
    codes = hashlib.sha256("\n".join(sorted(add_on_codes)).encode()).hexdigest()[:16]
    return Action(
        ATTACH_ADD_ONS,
        attach_subject(subscription_id),
        f"{ATTACH_ADD_ONS}:{subscription_id}:{codes}",
        {"id": subscription_id, "add_ons": sorted(add_on_codes)},
    )


def attach_subject(subscription_id: str) -> str:
    """The subject of every `attach_add_ons` of a subscription."""
    return f"add_ons:{subscription_id}"


def refresh_action(uuid: str, *, because: str) -> Action:
    """Look at a Recurly subscription again: its state and billing period may have changed."""
    return Action(
        REFRESH_SUBSCRIPTION,
        f"refresh:{uuid}",
        f"{REFRESH_SUBSCRIPTION}:{uuid}:{because}",
        {"uuid": uuid},
    )


def report_action(record_id: int, record: UsageRecord) -> Action:
    """Tell Recurly of one record. All of one add-on share a subject: one writer at a time."""
    return Action(
        REPORT_USAGE,
        f"usage:{record.subscription_id}:{record.quota_id}",
        f"{REPORT_USAGE}:{record.merchant_tag}",
        {"record": record_id},
    )


def audit_action(subscription_id: str, *, because: str, write: str | None = None) -> Action:
    """Compare the open billing cycle of a subscription with the ledger; and a `write`, whenever it was.

    Each is a subject of its own, so that one that waits for its hour holds up no other.
    """
    return Action(
        AUDIT_USAGE,
        f"audit:{subscription_id}:{because}",
        f"{AUDIT_USAGE}:{subscription_id}:{because}",
        {"id": subscription_id} | ({} if write is None else {"write": write}),
    )


def product_action(name: str, product_id: str | None, *, because: str) -> Action:
    """Bring the plans and subscriptions of a product in line with its label."""
    return Action(
        PROVISION_PRODUCT,
        f"product:{name}",
        f"{PROVISION_PRODUCT}:{name}:{because}",
        {"name": name, "id": product_id},
    )


def plan_action(name: str, plan_id: str | None, *, because: str) -> Action:
    """Bring Recurly in line with a product plan. Its subject is the name: a quota's event knows no id."""
    return Action(
        PROVISION_PLAN, f"plan:{name}", f"{PROVISION_PLAN}:{name}:{because}", {"name": name, "id": plan_id}
    )


def subscription_action(name: str, subscription_id: str, *, because: str) -> Action:
    """Bring Recurly in line with a subscription. Its subject is the id: names are used again."""
    return Action(
        PROVISION_SUBSCRIPTION,
        f"subscription:{subscription_id}",
        f"{PROVISION_SUBSCRIPTION}:{subscription_id}:{because}",
        {"name": name, "id": subscription_id},
    )

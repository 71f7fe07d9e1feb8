"""What Amplify must hold so that billingd hears of everything: webhook resources and a watch topic.

The resources are those of amplify.md 4.4 and 4.5, in the order in which they must be made.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol
from urllib.parse import urlsplit

from billingd.settings import Settings
from billingd.settings.values import is_loopback

Kind = Literal["Integration", "Secret", "Webhook", "ResourceHook", "WatchTopic"]

NAME: Final = "billingd"
"""The Integration, and how the names of all that lives in it begin."""

MARK: Final = {"billingd": "hooks"}
"""The attribute of whatever is made here; what lacks it may be somebody else's of that name."""

VALUE_KEY: Final = "value"
"""Under which key the Secret holds its value."""

OTHERS: Final = "is somebody else's, and left alone"
INSTEAD: Final[Mapping[str, str]] = {
    "Integration": f"delete that one, or mark it: attribute billingd = {MARK['billingd']}",
    "WatchTopic": "name another in catch_up.watch_topic, or delete that one",
}
"""What else can be done where somebody else has the name."""

DEFAULT_PATH: Final = "/webhooks/amplify"
MASKED: Final = "CHANGE-ME"
SCHEMES: Final = frozenset({"bearer", "basic"})
"""Words that the listener takes for no secret (`webhooks.Authenticator`)."""

ANY_PLAN: Final = {"kind": "ProductPlan", "name": "*"}
EVERYTHING: Final = ("created", "updated", "deleted")

TRIGGERS: Final[tuple[Mapping[str, Any], ...]] = (
    {"group": "catalog", "kind": "Product", "name": "*", "type": ["updated", "deleted"]},
    {"group": "catalog", "kind": "ProductPlan", "name": "*", "type": ["updated", "deleted"]},
    {"group": "catalog", "kind": "Quota", "name": "*", "type": list(EVERYTHING), "scope": ANY_PLAN},
    {"group": "catalog", "kind": "Subscription", "name": "*", "type": ["updated", "deleted"]},
)
"""A draft needs nothing, so what is only created is not asked for; a quota may come to an active plan."""

WATCHED: Final = tuple({**trigger, "type": list(EVERYTHING)} for trigger in TRIGGERS)
"""The feed also tells of what was created: it is how lost events are found, so it leaves nothing out."""

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "Integration": "Tells billingd of plans and subscriptions",
    "WatchTopic": "What billingd reads to find events it missed",
}
"""By which is known what an earlier release made, which marked nothing."""

INSIDE: Final[tuple[Kind, ...]] = ("ResourceHook", "Webhook", "Secret")
"""What lives in an Integration, in the order in which it is removed."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource of the API Server's management group; `scope` is the Integration it lives in."""

    kind: Kind
    name: str
    spec: Mapping[str, Any]
    scope: str | None = None

    def document(self, api_version: str) -> dict[str, Any]:
        """The whole resource, as `axway central apply -f` takes it."""
        scope = {"metadata": {"scope": {"kind": "Integration", "name": self.scope}}} if self.scope else {}
        head = {"group": "management", "apiVersion": api_version, "kind": self.kind, "name": self.name}
        return {**head, "title": self.name, "attributes": dict(MARK), **scope, "spec": dict(self.spec)}


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one resource, or would: `+` made, `~` changed, `-` deleted, `=` as it should be.

    `!`: it is somebody else's, and left alone.
    """

    op: Literal["+", "~", "-", "=", "!"]
    kind: Kind
    name: str
    reason: str


class Management(Protocol):
    """Where the resources are."""

    async def find(self, kind: Kind, name: str, scope: str | None) -> Mapping[str, Any] | None: ...
    async def everything(self, kind: Kind, scope: str | None) -> Sequence[Mapping[str, Any]]: ...
    async def create(
        self,
        kind: Kind,
        name: str,
        scope: str | None,
        spec: Mapping[str, object],
        attributes: Mapping[str, str],
    ) -> None: ...
    async def replace(
        self,
        kind: Kind,
        name: str,
        scope: str | None,
        raw: Any,
        spec: Mapping[str, object],
        attributes: Mapping[str, str],
    ) -> None: ...
    async def remove(
        self, kind: Kind, name: str, scope: str | None
    ) -> Literal["gone", "going", "missing"]: ...


def webhook_url(text: str) -> str:
    """Where Amplify is to post: https, or plain http on loopback; a bare host gets our path. ValueError."""
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be a URL, as in https://billingd.example.com")
    if parts.port is not None and not 0 < parts.port < 65536:
        raise ValueError("has no such port")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ValueError("must be https: the secret would travel in clear (plain http is for loopback only)")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("must have neither a user nor a fragment: webhooks.auth says how Amplify signs in")
    return text if parts.path.strip("/") else parts._replace(path=DEFAULT_PATH).geturl()


def secret_value(auth: str, secrets: str) -> str | None:
    """What the Secret holds so that the listener takes it: Amplify sends it verbatim (amplify.md 4.4).

    While two secrets are configured for a rotation it is the first. None when nothing is asked for, or
    nothing is set.
    """
    known = [word for word in secrets.split() if word.lower() not in SCHEMES]
    if auth == "none" or not known:
        return None
    if auth == "basic":
        return "Basic " + base64.b64encode(known[0].encode()).decode("ascii")
    return f"Bearer {known[0]}" if auth.lower() == "header:authorization" else known[0]


def resources(settings: Settings, url: str) -> tuple[Resource, ...]:
    """Everything, in the order in which it must be made."""
    how, _, name = settings.webhooks.auth.partition(":")
    webhook: dict[str, Any] = {"enabled": True, "url": url, "headers": {"Content-Type": "application/json"}}
    made = [Resource("Integration", NAME, {"description": DESCRIPTIONS["Integration"]})]
    if how != "none":
        value = secret_value(settings.webhooks.auth, settings.webhooks.secret.get_secret_value())
        made.append(Resource("Secret", f"{NAME}-secret", {"data": {VALUE_KEY: value or MASKED}}, NAME))
        place = {"in": "query" if how == "query" else "header", "name": name or "Authorization"}
        webhook["auth"] = {"secret": {"name": f"{NAME}-secret", "key": VALUE_KEY}, "location": place}
    made.append(Resource("Webhook", f"{NAME}-webhook", webhook, NAME))
    hook = {"triggers": list(TRIGGERS), "webhooks": [f"{NAME}-webhook"]}
    made.append(Resource("ResourceHook", f"{NAME}-hook", hook, NAME))
    return (*made, *_watch_topic(settings))


def _watch_topic(settings: Settings) -> list[Resource]:
    if not (name := settings.catch_up.watch_topic):
        return []
    spec = {"description": DESCRIPTIONS["WatchTopic"], "filters": list(WATCHED)}
    return [Resource("WatchTopic", name, spec)]


def masked(resource: Resource) -> Resource:
    """The same, without any secret in it."""
    if resource.kind != "Secret":
        return resource
    return replace(resource, spec={"data": dict.fromkeys(resource.spec["data"], MASKED)})


async def apply(management: Management, wanted: Sequence[Resource], *, dry_run: bool = False) -> list[Step]:
    """Make what is missing and mend what differs, in order.

    Amplify never shows what a Secret holds, so nobody can tell whether it is right: it is written each time.
    A field that Amplify has and we do not name is left alone, as long as nothing else differs; and so is what
    somebody else has made under that name.
    """
    steps: list[Step] = []
    for one in wanted:
        raw = await management.find(one.kind, one.name, one.scope)
        step = _step(one, raw)
        if not dry_run and step.op == "+":
            await management.create(one.kind, one.name, one.scope, one.spec, MARK)
        elif not dry_run and step.op == "~":
            await management.replace(one.kind, one.name, one.scope, raw, one.spec, MARK)
        steps.append(step)
    return steps


async def removal(management: Management) -> list[Step]:
    """What is to be removed, in its order, and what stays because others made it; nothing is changed.

    Whatever was made here is found by its mark, also what the settings name no more. An Integration in which
    somebody else's resources live stays, for they would go with it.
    """
    topics = [raw for raw in await management.everything("WatchTopic", None) if ours("WatchTopic", raw)]
    steps = [Step("-", "WatchTopic", raw["name"], "is billingd's") for raw in topics]
    integration = await management.find("Integration", NAME, None)
    if integration is None:
        return [*steps, Step("=", "Integration", NAME, "is not there")]
    others = []
    for kind in INSIDE:
        for raw in await management.everything(kind, NAME):
            if ours(kind, raw):
                steps.append(Step("-", kind, raw["name"], "is billingd's"))
            else:
                others.append(f"{kind} {raw['name']}")
                steps.append(Step("!", kind, raw["name"], OTHERS))
    if not ours("Integration", integration):
        steps.append(Step("!", "Integration", NAME, OTHERS))
    elif others:
        steps.append(
            Step("!", "Integration", NAME, f"stays, for others' {', '.join(others)} would go with it")
        )
    else:
        steps.append(Step("-", "Integration", NAME, "is billingd's"))
    return steps


async def remove(management: Management, steps: Sequence[Step]) -> list[Step]:
    """Delete what `removal` found; what is gone by now needs no deletion."""
    reasons = {"gone": "deleted", "going": "deleted; Amplify is still removing what hangs on it"}
    done = []
    for step in steps:
        if step.op != "-":
            done.append(step)
            continue
        answer = await management.remove(step.kind, step.name, NAME if step.kind in INSIDE else None)
        if answer == "missing":
            done.append(replace(step, op="=", reason="is not there"))
        else:
            done.append(replace(step, reason=reasons[answer]))
    return done


def told_of(filters: Any) -> set[tuple[str, str]]:
    """Kind and type of each event that such triggers or filters ask for, of those that leave none out."""
    rows = [row for row in filters or () if isinstance(row, Mapping)]
    return {
        (str(row.get("kind")), str(type_))
        for row in rows
        if row.get("name", "*") == "*" and row.get("group") == "catalog"
        for type_ in row.get("type") or ()
    }


def ours(kind: Kind, raw: Mapping[str, Any]) -> bool:
    """Whether it was made here. What lives in our Integration under our names is ours in any case."""
    if _marked(raw):
        return True
    if kind in INSIDE:
        return str(raw.get("name", "")).startswith(f"{NAME}-")
    spec = raw.get("spec")
    return isinstance(spec, Mapping) and spec.get("description") == DESCRIPTIONS[kind]


def _marked(raw: Mapping[str, Any]) -> bool:
    has = raw.get("attributes")
    return isinstance(has, Mapping) and MARK.items() <= has.items()


def _step(one: Resource, raw: Mapping[str, Any] | None) -> Step:
    if raw is None:
        return Step("+", one.kind, one.name, "is missing")
    if not ours(one.kind, raw):
        spec = raw.get("spec")
        filters = spec.get("filters") if isinstance(spec, Mapping) else None
        if one.kind == "WatchTopic" and told_of(WATCHED) <= told_of(filters):
            return Step("=", one.kind, one.name, "is somebody else's, and tells of all that is needed")
        return Step("!", one.kind, one.name, f"{OTHERS}; {INSTEAD[one.kind]}")
    if one.kind == "Secret":
        return Step("~", one.kind, one.name, "is written each time: Amplify never shows what it holds")
    if wrong := _differing(one.spec, raw.get("spec"), ""):
        return Step("~", one.kind, one.name, f"differs in {', '.join(wrong)}")
    if not _marked(raw):
        return Step("~", one.kind, one.name, "is not marked as billingd's")
    return Step("=", one.kind, one.name, "is as it should be")


def _differing(wanted: Any, there: Any, at: str) -> list[str]:
    """The fields, by name only, that are not at Amplify as they are wanted."""
    if isinstance(wanted, Mapping):
        has = there if isinstance(there, Mapping) else {}
        return [
            wrong
            for key, value in wanted.items()
            for wrong in _differing(value, has.get(key), f"{at}.{key}" if at else key)
        ]
    if isinstance(wanted, list):
        return [] if isinstance(there, list) and _same(wanted, there) else [at]
    return [] if wanted == there else [at]


def _same(wanted: Sequence[Any], there: Sequence[Any]) -> bool:
    """Whether two lists say the same, in whatever order."""
    left = list(there)
    for one in wanted:
        found = next((each for each in left if not _differing(one, each, "item")), None)
        if found is None:
            return False
        left.remove(found)
    return not left

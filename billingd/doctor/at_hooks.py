"""Checks of what makes Amplify tell billingd: webhooks, their secret, their triggers, the watch topic."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from billingd import hooks
from billingd.doctor.findings import Found, fine, look, skipped
from billingd.settings import Settings
from billingd.webhooks import AMPLIFY_PATHS

Raw = Mapping[str, Any]
WITHOUT_FEED: Final = ("ProductPlan", "Subscription")
"""Kinds that webhooks must tell of; the others may come by the watch topic alone."""
PLACEHOLDER: Final = "https://YOUR.HOST"


class Management(Protocol):
    """Where the resources are."""

    async def find(self, kind: hooks.Kind, name: str, scope: str | None) -> Raw | None: ...
    async def every(self, kind: hooks.Kind) -> Sequence[Raw]: ...


class Feed(Protocol):
    """The watch topic's events."""

    async def newest_position(self, topic: str) -> int | None: ...


class HookChecks:
    """Webhooks of any name that post to billingd count: those of the original integration do too."""

    def __init__(self, management: Management, feed: Feed, settings: Settings) -> None:
        self._management = management
        self._feed = feed
        self._settings = settings
        self._url = PLACEHOLDER

    async def webhooks(self) -> Sequence[Found]:
        """A webhook posts to billingd, is switched on, and signs in as the listener asks for it."""
        ours = [one for one in await self._management.every("Webhook") if _posts_here(one)]
        if not ours:
            return [
                look(
                    "no Webhook at Amplify posts to billingd: it learns of changes only from the watch topic "
                    "and by listing",
                    self._apply(),
                )
            ]
        secrets = {(_scope(one), str(one.get("name"))): one for one in await self._management.every("Secret")}
        found: list[Found] = []
        for one in ours:
            self._url = _url(one) if urlsplit(_url(one)).scheme == "https" else self._url
            faults = list(self._faults(one, secrets))
            named = f"Webhook {one.get('name')} ({_url(one)})"
            found += [look(f"{named} {said}", self._mend(one)) for said in faults]
            if not faults:
                found.append(fine(f"{named} is switched on and {self._carries()}"))
        return found

    def _faults(self, one: Raw, secrets: Mapping[tuple[str, str], Raw]) -> "list[str]":
        spec = _spec(one)
        faults = [] if spec.get("enabled") is True else ["is switched off"]
        how, _, name = self._settings.webhooks.auth.partition(":")
        if how == "none":
            return faults
        auth = spec.get("auth")
        if not isinstance(auth, Mapping):
            return [*faults, "carries no secret, so that the listener refuses what it sends"]
        secret = _mapping(auth, "secret")
        held = secrets.get((_scope(one), str(secret.get("name"))))
        data = _spec(held).get("data") if held is not None else None
        if held is None:
            faults.append(
                f"names the Secret {secret.get('name')}, which was deleted: it sends no authentication, so "
                "that the listener refuses what it sends"
            )
        elif isinstance(data, Mapping) and secret.get("key") not in data:
            faults.append(f"names the key {secret.get('key')} of Secret {secret.get('name')}, which has none")
        location = _mapping(auth, "location")
        sent = (location.get("in") or "header", (location.get("name") or "Authorization").lower())
        wanted = ("query" if how == "query" else "header", (name or "Authorization").lower())
        if sent != wanted:
            faults.append(
                f"sends its secret as {sent[0]} {sent[1]}, webhooks.auth wants it as {wanted[0]} {wanted[1]}"
            )
        return faults

    def _carries(self) -> str:
        if self._settings.webhooks.auth == "none":
            return "needs no secret (webhooks.auth)"
        return "carries a secret; what it holds Amplify never shows"

    async def triggers(self) -> Sequence[Found]:
        """Every change that matters triggers a webhook that posts to billingd."""
        ours = {
            (_scope(one), str(one.get("name")))
            for one in await self._management.every("Webhook")
            if _posts_here(one)
        }
        told: set[tuple[str, str]] = set()
        for hook in await self._management.every("ResourceHook"):
            spec = _spec(hook)
            if any((_scope(hook), str(name)) in ours for name in spec.get("webhooks") or ()):
                told |= hooks.told_of(spec.get("triggers"))
        wanted = hooks.told_of(hooks.TRIGGERS)
        missing = wanted - told
        needed = {one for one in missing if one[0] in WITHOUT_FEED or not self._settings.catch_up.watch_topic}
        if needed:
            return [look(f"no ResourceHook tells billingd of {_words(needed)}", self._apply())]
        if missing:
            return [fine(f"{_words(missing)} come by the watch topic only")]
        return [fine(f"{_words(wanted)} trigger a webhook")]

    async def watch_topic(self) -> Sequence[Found]:
        """The topic is there, asks for everything, and its feed can be read."""
        name = self._settings.catch_up.watch_topic
        if not name:
            return [skipped("catch_up.watch_topic is empty: the feed is switched off")]
        raw = await self._management.find("WatchTopic", name, None)
        if raw is None:
            return [
                look(f"there is no WatchTopic {name}: a lost webhook is found by listing only", self._apply())
            ]
        wanted = hooks.told_of(hooks.WATCHED)
        if missing := wanted - hooks.told_of(_spec(raw).get("filters")):
            fix = self._apply() if hooks.ours("WatchTopic", raw) else hooks.INSTEAD["WatchTopic"]
            return [look(f"WatchTopic {name} does not tell of {_words(missing)}", fix)]
        newest = await self._feed.newest_position(name)
        where = "keeps no event yet" if newest is None else f"is at event {newest}"
        return [fine(f"WatchTopic {name} can be read and {where}")]

    def _apply(self) -> str:
        return f"billingd hooks apply --webhook-url {self._url}"

    def _mend(self, one: Raw) -> str:
        """`hooks apply` mends its own; others are mended where they were made."""
        if one.get("name") == f"{hooks.NAME}-webhook" and _scope(one) == hooks.NAME:
            return f"billingd hooks apply --webhook-url {_url(one)}"
        return (
            f"{self._apply()}, then delete the old one: axway central delete integration {_scope(one)}    "
            f"(or mend Webhook {one.get('name')} there)"
        )


class Reach(Protocol):
    """A GET of an address: the status and the error code of the answer, if it has one."""

    async def __call__(self, url: str) -> tuple[int, str | None]: ...


class Arrivals:
    """Checks of the way from Amplify to the listener, while a daemon runs."""

    def __init__(
        self,
        management: Management,
        reach: Reach,
        ask: Callable[[str, str], Awaitable[Mapping[str, Any]]],
    ) -> None:
        self._management = management
        self._reach = reach
        self._ask = ask

    async def addresses(self) -> Sequence[Found]:
        """What Amplify posts to is our listener, as far as this machine can tell."""
        urls = {_url(one) for one in await self._management.every("Webhook") if _posts_here(one)}
        found = []
        for url in sorted(urls):
            try:
                status, code = await self._reach(url)
            except OSError as error:
                found.append(
                    look(
                        f"{url} does not answer from this machine: {error}",
                        f"curl -v {url}    shows why: the proxy, its certificate (of a public authority), "
                        "DNS, or webhooks.listen",
                    )
                )
                continue
            if (status, code) == (405, "method_not_allowed"):
                found.append(fine(f"{url} leads to billingd's listener"))
            else:
                found.append(
                    look(
                        f"{url} leads elsewhere: GET is answered with {status}, not by billingd's listener",
                        f"let the proxy pass {urlsplit(url).path} on to webhooks.listen",
                    )
                )
        return found or [skipped("no Webhook at Amplify posts to billingd")]

    async def believed(self) -> Sequence[Found]:
        """The listener does not turn deliveries away for want of the secret."""
        counts = (await self._ask("/status", "webhooks"))["webhooks"]
        refused, accepted = counts.get("unauthorized", 0), counts.get("accepted", 0)
        if refused:
            return [
                look(
                    f"{refused} delivery(s) without the right secret were refused since the daemon started "
                    f"({accepted} accepted so far)",
                    "billingd hooks apply --webhook-url URL    writes the secret anew (a stranger's are "
                    "refused too: see the log)",
                )
            ]
        return [fine("no delivery was refused for want of the secret since the daemon started")]


def _posts_here(one: Raw) -> bool:
    path = urlsplit(_url(one)).path.rstrip("/")
    named = one.get("name") == f"{hooks.NAME}-webhook" and _scope(one) == hooks.NAME
    return named or path.endswith(AMPLIFY_PATHS)


def _url(one: Raw) -> str:
    return str(_spec(one).get("url") or "")


def _spec(one: Raw) -> Raw:
    return _mapping(one, "spec")


def _mapping(raw: Raw, key: str) -> Raw:
    found = raw.get(key)
    return found if isinstance(found, Mapping) else {}


def _scope(one: Raw) -> str:
    return str(_mapping(_mapping(one, "metadata"), "scope").get("name") or "")


def _words(pairs: set[tuple[str, str]]) -> str:
    kinds: dict[str, list[str]] = {}
    for kind, type_ in sorted(pairs):
        kinds.setdefault(kind, []).append(type_)
    return ", ".join(f"{kind} {'/'.join(types)}" for kind, types in kinds.items())

"""Integrations, what lives in them, and watch topics: the API Server's management group (amplify.md 4.4)."""

from collections.abc import Mapping
from typing import Final, Literal

from billingd.adapters.amplify.answers import Call, Reply, json_of
from billingd.adapters.amplify.catalog import ApiVersion, Catalog
from billingd.adapters.amplify.encoding import Json, encode, segment
from billingd.adapters.amplify.http import Http
from billingd.domain.errors import NotFound, Permanent

Kind = Literal["Integration", "Secret", "Webhook", "ResourceHook", "WatchTopic"]

UNSCOPED: Final[Mapping[Kind, str]] = {"Integration": "integrations", "WatchTopic": "watchtopics"}
SCOPED: Final[Mapping[Kind, str]] = {
    "Secret": "secrets",
    "Webhook": "webhooks",
    "ResourceHook": "resourcehooks",
}
"""Kinds that live in an Integration."""


class Management:
    """Raw resources of `/apis/management`. `scope` is the Integration's name, for kinds that live in one."""

    def __init__(self, http: Http, central_url: str, api_version: ApiVersion) -> None:
        self._group = Catalog(http, central_url, api_version, group="management")

    async def find(self, kind: Kind, name: str, scope: str | None) -> dict[str, Json] | None:
        """One resource, or None when there is none; of a Secret Amplify never shows the values."""
        try:
            raw = await self._ask("GET", f"reading {kind} {name}", kind, scope, name)
        except NotFound:
            return None
        return _resource(raw, kind, name)

    async def every(self, kind: Kind) -> tuple[dict[str, Json], ...]:
        """All of a kind, whichever Integration they live in (amplify.md 2.1: such may be listed unscoped)."""
        return await self._group.rows(UNSCOPED.get(kind) or SCOPED[kind], "", kind)

    @property
    def versions(self) -> Mapping[str, ApiVersion]:
        """The version under which each collection has answered so far."""
        return self._group.versions

    async def everything(self, kind: Kind, scope: str | None) -> tuple[dict[str, Json], ...]:
        """All resources of a kind, or all that live in one Integration; none where that is not there."""
        path = "" if scope is None else f"/{segment(scope)}/{SCOPED[kind]}"
        try:
            return await self._group.rows(UNSCOPED.get(kind, "integrations"), path, kind)
        except NotFound:
            return ()

    async def create(
        self,
        kind: Kind,
        name: str,
        scope: str | None,
        spec: Mapping[str, object],
        attributes: Mapping[str, str],
    ) -> None:
        """Make a resource; raises Conflict when there is one of that name."""
        body: dict[str, object] = {"group": "management", "kind": kind, "name": name, "title": name}
        body |= {"attributes": dict(attributes), "spec": dict(spec)}
        await self._ask("POST", f"making {kind} {name}", kind, scope, None, body)

    async def replace(
        self,
        kind: Kind,
        name: str,
        scope: str | None,
        raw: Mapping[str, Json],
        spec: Mapping[str, object],
        attributes: Mapping[str, str],
    ) -> None:
        """Give a resource another spec and these attributes, too; raises Conflict when it changed since."""
        has = raw.get("attributes")
        more = {**(has if isinstance(has, dict) else {}), **attributes}
        body = {**raw, "attributes": more, "spec": dict(spec)}
        await self._ask("PUT", f"changing {kind} {name}", kind, scope, name, body)

    async def remove(self, kind: Kind, name: str, scope: str | None) -> Literal["gone", "going", "missing"]:
        """Delete a resource. `going`: Amplify took it on and is still removing what hangs on it."""
        try:
            reply, _ = await self._send("DELETE", f"deleting {kind} {name}", kind, scope, name, None)
        except NotFound:
            return "missing"
        return "going" if reply.status == 202 else "gone"

    async def _ask(
        self,
        method: str,
        what: str,
        kind: Kind,
        scope: str | None,
        name: str | None,
        body: Mapping[str, object] | None = None,
    ) -> Json:
        reply, call = await self._send(method, what, kind, scope, name, body)
        return json_of(call, reply)

    async def _send(
        self,
        method: str,
        what: str,
        kind: Kind,
        scope: str | None,
        name: str | None,
        body: Mapping[str, object] | None,
    ) -> tuple[Reply, Call]:
        # What lives in an Integration has the version that integrations have.
        plural = UNSCOPED.get(kind, "integrations")
        path = "" if scope is None else f"/{segment(scope)}/{SCOPED[kind]}"
        path += "" if name is None else f"/{segment(name)}"

        def call_for(base: str) -> Call:
            version = base.split("/")[-2]
            sent = None if body is None else encode({**body, "apiVersion": version})
            return Call(method, base + path, what, sent, writes=method != "GET")

        return await self._group.ask(plural, call_for)


def _resource(raw: Json, kind: str, name: str) -> dict[str, Json]:
    if not isinstance(raw, dict):
        raise Permanent(f"Amplify's answer for {kind} {name} is not a resource")
    return raw

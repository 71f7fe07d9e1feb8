"""A group of the API Server: versions, single resources, whole listings (amplify.md 2.1-2.4)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import structlog

from billingd.adapters.amplify.answers import Call, Reply, json_of
from billingd.adapters.amplify.encoding import Json, all_of, query_string, segment
from billingd.adapters.amplify.http import Http
from billingd.adapters.amplify.listing import PAGE_SIZE, Page, read_all
from billingd.domain.errors import Misconfigured, NotFound, Permanent

log = structlog.get_logger(__name__)

ApiVersion = Literal["v1", "v1alpha1"]
T = TypeVar("T")


class Catalog:
    """Raw resources of `/apis/catalog` (or of another group), by collection.

    A 404 is believed only after the collection itself has answered under the same version: with a wrong
    address or version every resource would otherwise look deleted (amplify.md 2.1, open question 21).
    """

    def __init__(
        self, http: Http, central_url: str, api_version: ApiVersion, *, group: str = "catalog"
    ) -> None:
        self._http = http
        self._base = f"{central_url.rstrip('/')}/apis/{group}"
        self._candidates: tuple[ApiVersion, ApiVersion] = (
            api_version,
            "v1alpha1" if api_version == "v1" else "v1",
        )
        self._proved: dict[str, ApiVersion] = {}

    @property
    def versions(self) -> Mapping[str, ApiVersion]:
        """The version under which each collection has answered so far."""
        return self._proved

    def url(self, plural: str, name: str) -> str:
        """Where one resource is; meant for after a read, which settles the version."""
        version = self._proved.get(plural, self._candidates[0])
        return f"{self._base}/{version}/{plural}/{segment(name)}"

    async def rows(
        self, plural: str, path: str, kind: str, where: Sequence[str] = ()
    ) -> tuple[dict[str, Json], ...]:
        """All rows of a collection, oldest first, each once (amplify.md 2.3)."""
        return await self.read_rows(plural, path, kind, lambda row: row, where)

    async def read_rows(
        self,
        plural: str,
        path: str,
        kind: str,
        read: Callable[[dict[str, Json]], T],
        where: Sequence[str] = (),
    ) -> tuple[T, ...]:
        """The same, each row read as its page comes, so that no more is kept than what is made of it."""

        async def page(number: int) -> Page:
            params = [("page", str(number)), ("pageSize", str(PAGE_SIZE))]
            params += [("query", all_of(where))] if where else []
            params += [("sort", "metadata.audit.createTimestamp,ASC")]
            reply, call = await self.ask(
                plural,
                lambda base: Call("GET", base + path + query_string(params), f"listing {plural}{path}"),
            )
            return Page.of(kind, json_of(call, reply), reply.headers.get("X-Axway-Total-Count"))

        return await read_all(f"{plural}{path}", page, read)

    async def ask(self, plural: str, call_for: Callable[[str], Call]) -> tuple[Reply, Call]:
        """Send the call a collection's base URL makes, under the version that collection exists in.

        404 is ambiguous: no such resource, or no such version. Until a collection has answered once, a 404
        makes us ask the collection itself; what that shows is kept for the life of the process. 404 means the
        request did nothing, so repeating it under the other version is safe for writes too.
        """
        version = self._proved.get(plural) or self._candidates[0]
        reply, call = await self._send_under(version, plural, call_for)
        if reply.status == 404 and plural not in self._proved:
            proved = await self._prove(plural)
            if proved != version:
                reply, call = await self._send_under(proved, plural, call_for)
        if reply.status == 404:
            raise self._http.error(call, reply)
        self._proved.setdefault(plural, version)
        return reply, call

    async def _send_under(
        self, version: ApiVersion, plural: str, call_for: Callable[[str], Call]
    ) -> tuple[Reply, Call]:
        call = call_for(f"{self._base}/{version}/{plural}")
        return await self._http.send(replace(call, handles=call.handles | {404})), call

    async def _prove(self, plural: str) -> ApiVersion:
        for version in self._candidates:
            url = f"{self._base}/{version}/{plural}?pageSize=1"
            reply = await self._http.send(
                Call("GET", url, f"a test read of {plural}", handles=frozenset({404}))
            )
            if reply.ok:
                if version != self._candidates[0]:
                    log.info("amplify.version_fell_back", collection=plural, version=version)
                self._proved[plural] = version
                return version
        raise Misconfigured(
            f"Amplify has {plural} neither as {' nor as '.join(self._candidates)}: check amplify.central_url"
        )

    async def read(self, plural: str, name: str) -> dict[str, Json]:
        """One resource; NotFound when there is none."""
        path = f"/{segment(name)}"
        reply, call = await self.ask(
            plural, lambda base: Call("GET", base + path, f"reading {plural}/{name}")
        )
        raw = json_of(call, reply)
        if not isinstance(raw, dict):
            raise Permanent(f"Amplify's answer for {plural}/{name} is not a resource")
        return raw

    async def find(self, plural: str, name: str) -> dict[str, Json] | None:
        """One resource, or None when there is none."""
        try:
            return await self.read(plural, name)
        except NotFound:
            return None

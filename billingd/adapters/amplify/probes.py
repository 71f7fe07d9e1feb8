"""What may be asked of Amplify to see whether everything billingd does there would go well; reads only."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Final

from billingd.adapters.amplify.answers import Call
from billingd.adapters.amplify.catalog import Catalog
from billingd.adapters.amplify.encoding import segment
from billingd.adapters.amplify.http import Http
from billingd.adapters.amplify.management import Management
from billingd.domain.errors import Refused

NOBODY: Final = "billingd-doctor"
"""A user there is not: whoever may read users is told so, others are refused."""


class Probes:
    """Each asks for one thing, and raises what stands in the way; nothing is written."""

    def __init__(self, http: Http, catalog: Catalog, management: Management, platform_url: str) -> None:
        self._http = http
        self._catalog = catalog
        self._management = management
        self._platform = f"{platform_url.rstrip('/')}/api/v1"

    @property
    def skew(self) -> timedelta | None:
        """How far Amplify's clock is ahead of ours, to a second or two; None before its first answer."""
        return self._http.skew

    @property
    def versions(self) -> Mapping[str, str]:
        """The API version under which each collection has answered so far."""
        return {**self._catalog.versions, **self._management.versions}

    async def token(self) -> timedelta:
        """Log in; how long the token is used."""
        return await self._http.log_in()

    async def collection(self, plural: str) -> None:
        """Read one row of a collection of the catalog."""
        await self._catalog.ask(
            plural, lambda base: Call("GET", f"{base}?pageSize=1", f"a test read of {plural}")
        )

    async def hidden(self, plural: str) -> int | None:
        """How many of a collection there are that this account may not see; None when Amplify says nothing.

        Without the role Engage Admin an account sees only what belongs to its teams (amplify.md 1.1).
        """
        totals = []
        for which in ("accessible", "all"):
            try:
                reply, _ = await self._catalog.ask(
                    plural,
                    lambda base, which=which: Call(  # type: ignore[misc]
                        "HEAD", f"{base}?count={which}", f"a count of {plural}"
                    ),
                )
            except Refused:  # documented, but not for every collection by name
                return None
            totals.append(reply.headers.get("X-Axway-Total-Count", ""))
        accessible, all_ = totals
        return int(all_) - int(accessible) if all_.isdigit() and accessible.isdigit() else None

    async def users(self, user_id: str | None) -> None:
        """Read a user of the platform, or ask for one there is not; Misconfigured when that is forbidden."""
        url = f"{self._platform}/user/{segment(user_id or NOBODY)}"
        await self._http.send(Call("GET", url, "reading a user", handles=frozenset({404}), platform=True))

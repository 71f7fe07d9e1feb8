"""The tenant on HTTP: every path of the sandbox's Amplify."""

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from billingd.sandbox.amplify import people, tokens
from billingd.sandbox.amplify.api import Api
from billingd.sandbox.amplify.errors import Refused, errors_body
from billingd.sandbox.amplify.feed import Feed
from billingd.sandbox.amplify.lexus import Search
from billingd.sandbox.amplify.tenant import Tenant
from billingd.sandbox.amplify.traceability import Traceability

TRACEABILITY: Final = "/api/traceability/v1/traceability"
PREFIXES: Final = ("/auth/", "/apis/", "/events/", "/api/")
"""Where Amplify's paths begin; all else on the port is Recurly's."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def routes(tenant: Tenant) -> list[web.RouteDef]:
    """All routes; each but the token's wants a bearer."""
    traceability, platform = Traceability(tenant), _Platform(tenant)

    async def grant(request: web.Request) -> web.StreamResponse:
        return await tenant.tokens.grant(request, tenant.settings.token_seconds)

    guard = _Guard(tenant)
    api, feed, search = Api(tenant), Feed(tenant), Search(tenant)
    table: list[tuple[str, str, Handler]] = [
        ("GET", "/events/management/{version}/watchtopics/{name}", feed.read),
        ("GET", f"{TRACEABILITY}/summary", traceability.summary),
        ("POST", f"{TRACEABILITY}/consumer/v2/summary", traceability.consumer_summary),
        ("POST", f"{TRACEABILITY}/consumer/v2/chart", traceability.chart),
        ("POST", f"{TRACEABILITY}/consumer/v2/chartGroupedBy", traceability.chart_grouped_by),
        ("POST", f"{TRACEABILITY}/search", search.search),
    ]
    steps = ("{a}", "{a}/{b}", "{a}/{b}/{c}", "{a}/{b}/{c}/{d}", "{a}/{b}/{c}/{d}/{e}")
    table.extend(("*", f"/apis/{{group}}/{{version}}/{step}", api.serve) for step in steps)
    found = [web.route(method, path, guard.central(handler)) for method, path, handler in table]
    platform_table: list[tuple[str, Handler]] = [
        ("/api/v1/user/{id}", platform.user),
        ("/api/v1/team/{id}", platform.team),
        ("/api/v1/team/{id}/user", platform.members),
        ("/api/v1/org/{id}", platform.organization),
    ]
    found.extend(web.get(path, guard.platform(handler)) for path, handler in platform_table)
    found.append(web.post(tokens.PATH, grant))
    return found


class _Guard:
    """Wants a bearer, and words refusals as each API does."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant

    def central(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._tenant.tokens.check(request)
                return await handler(request)
            except Refused as refused:
                body = errors_body(refused.status, refused.detail, self._tenant.organization_id)
                return web.json_response(body, status=refused.status, headers=refused.headers)

        return guarded

    def platform(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._tenant.tokens.check(request)
                return await handler(request)
            except Refused as refused:
                return people.platform_error(refused.status, refused.detail)

        return guarded


class _Platform:
    """Handlers of the Platform API (amplify.md 7)."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant

    async def user(self, request: web.Request) -> web.Response:
        """`GET /user/{id or guid}`."""
        user = self._tenant.people.user(request.match_info["id"])
        if user is None or request.match_info["id"] == user.name or self._hidden(user.organization):
            raise Refused(404, "Resource Not Found")
        return people.platform_answer(people.user_shown(user))

    async def team(self, request: web.Request) -> web.Response:
        """`GET /team/{guid}`."""
        return people.platform_answer(people.team_shown(self._team(request)))

    async def members(self, request: web.Request) -> web.Response:
        """`GET /team/{guid}/user`."""
        return people.platform_answer(people.members_shown(self._team(request)))

    async def organization(self, request: web.Request) -> web.Response:
        """`GET /org/{id}`."""
        visible = self._tenant.settings.consumer_users_visible
        return people.platform_answer(
            self._tenant.people.organization(request.match_info["id"], visible=visible)
        )

    def _team(self, request: web.Request) -> people.Team:
        team = self._tenant.people.team(request.match_info["id"])
        if team is None or request.match_info["id"] != team.guid or self._hidden(team.organization):
            raise Refused(404, "Resource Not Found")
        return team

    def _hidden(self, organization: str) -> bool:
        visible = self._tenant.settings.consumer_users_visible
        return not visible and organization != self._tenant.organization_id

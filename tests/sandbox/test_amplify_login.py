"""Tokens and the Platform API."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import BasicAuth
from amplify_side import CATALOG, TOKEN_PATH, AmplifySide, amplify_side

GRANT = {"grant_type": "client_credentials"}


@pytest.fixture
async def amplify() -> AsyncIterator[AmplifySide]:
    async with amplify_side() as side:
        yield side


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"data": GRANT, "auth": BasicAuth("DOSA_sandbox", "sandbox-client-secret")}, 200),
        ({"data": {**GRANT, "client_id": "DOSA_sandbox", "client_secret": "sandbox-client-secret"}}, 200),
        ({"data": GRANT, "auth": BasicAuth("DOSA_sandbox", "wrong")}, 401),
        ({"data": {**GRANT, "client_id": "DOSA_sandbox"}}, 401),
        ({"data": GRANT, "headers": {"Authorization": "Basic ???"}}, 401),
        ({"data": {"grant_type": "password"}}, 400),
        ({"json": GRANT}, 415),
    ],
)
async def test_a_token_is_given_for_the_right_credentials(
    amplify: AmplifySide, options: dict[str, Any], status: int
) -> None:
    """Basic or form credentials; no others."""
    answer = await amplify.client.post(TOKEN_PATH, **options)
    assert answer.status == status
    if status == 200:
        body = await answer.json()
        assert (body["expires_in"], body["refresh_expires_in"], body["token_type"]) == (1800, 0, "bearer")


@pytest.mark.parametrize(
    "path", [f"{CATALOG}/products", "/api/v1/user/u", "/api/traceability/v1/traceability/summary"]
)
async def test_every_api_wants_a_living_bearer(amplify: AmplifySide, path: str) -> None:
    """No bearer, a made-up one and an expired one are 401; another tenant's header is 403."""
    assert (await amplify.client.get(path)).status == 401
    assert (await amplify.client.get(path, headers={"Authorization": "Bearer made-up"})).status == 401
    other = await amplify.call("GET", path, headers={"X-Axway-Tenant-Id": "999"})
    assert other.status == (400 if path.startswith("/api/v1") else 403)
    amplify.clock.advance(timedelta(seconds=1800))
    assert (await amplify.call("GET", path)).status == 401


async def test_people_are_found_by_guid_and_by_id(amplify: AmplifySide) -> None:
    """Users, teams and organisations in the platform's envelope."""
    made = amplify.subscribe(amplify.plan())
    resource = made.body["marketplace"]["resource"]
    guid, team = resource["metadata"]["createUserId"], resource["owner"]["id"]
    user = (await amplify.json("GET", f"/api/v1/user/{guid}"))["result"]
    assert (user["guid"], user["email"]) == (guid, "acme@example.com")
    assert (await amplify.json("GET", f"/api/v1/user/{user['_id']}"))["result"] == user
    shown = (await amplify.json("GET", f"/api/v1/team/{team}"))["result"]
    assert [each["guid"] for each in shown["users"]] == [guid]
    assert "email" not in shown["users"][0]
    members = await amplify.json("GET", f"/api/v1/team/{team}/user")
    assert (members["result"][0]["email"], members["_metadata"]["count"]) == ("acme@example.com", 1)
    organization = (await amplify.json("GET", "/api/v1/org/200000000000002"))["result"]
    assert organization["provider_guid"] == amplify.tenant.organization_id


@pytest.mark.parametrize("path", ["user/nobody", "team/nobody", "team/nobody/user", "org/nowhere"])
async def test_the_platform_says_not_found_with_400(amplify: AmplifySide, path: str) -> None:
    """HTTP 400, the true status in `code`."""
    answer = await amplify.json("GET", f"/api/v1/{path}", status=400)
    assert answer == {"success": False, "code": 404, "description": "Resource Not Found"}


async def test_consumers_may_be_hidden(amplify: AmplifySide) -> None:
    """With the switch, a consumer organisation's users cannot be read."""
    made = amplify.subscribe(amplify.plan())
    guid = made.body["marketplace"]["resource"]["metadata"]["createUserId"]
    amplify.tenant.settings.consumer_users_visible = False
    await amplify.json("GET", f"/api/v1/user/{guid}", status=400)

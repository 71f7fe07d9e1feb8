"""Users, teams and organisations, and the Platform API that shows them (amplify.md 7)."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.settings import PAGE_SIZE_MAX

CONSUMER_ORGANIZATION = "200000000000002"


@dataclass(slots=True)
class User:
    """Somebody with a login; `email` may be absent (service accounts have no mailbox)."""

    name: str
    email: str | None
    organization: str
    guid: str = field(default_factory=lambda: str(uuid.uuid4()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])


@dataclass(slots=True)
class Team:
    """A team of one organisation; owns subscriptions."""

    name: str
    organization: str
    guid: str = field(default_factory=lambda: str(uuid.uuid4()))
    users: list[User] = field(default_factory=list)
    subscriptions: list[str] = field(default_factory=list)
    """Ids of what it subscribed to."""


class People:
    """Everybody the platform knows."""

    def __init__(self, organization_id: str) -> None:
        self.organization_id = organization_id
        self._users: dict[str, User] = {}
        self._teams: dict[str, Team] = {}
        self.organizations: dict[str, str] = {
            organization_id: "Provider",
            CONSUMER_ORGANIZATION: "Consumer",
        }

    def add_user(self, user: User) -> User:
        """Makes a user known under name, guid and id."""
        self.organizations.setdefault(user.organization, user.organization)
        for key in (user.name, user.guid, user.id):
            self._users[key] = user
        return user

    def add_team(self, team: Team) -> Team:
        """Makes a team known under name and guid."""
        self.organizations.setdefault(team.organization, team.organization)
        for key in (team.name, team.guid):
            self._teams[key] = team
        return team

    def user(self, key: str) -> User | None:
        """By name, guid or id."""
        return self._users.get(key)

    def team(self, key: str) -> Team | None:
        """By name or guid."""
        return self._teams.get(key)

    def organization(self, key: str, *, visible: bool) -> dict[str, Any]:
        """`GET /org/{id}`."""
        if key not in self.organizations or not (visible or key == self.organization_id):
            raise Refused(404, "Resource Not Found")
        own = key == self.organization_id
        return {
            "guid": key,
            "org_id": key,
            "name": self.organizations[key],
            "provider_guid": None if own else self.organization_id,
            "region": "US",
            "users": [
                {"guid": user.guid, "roles": ["consumer"], "primary": False}
                for guid, user in self._users.items()
                if guid == user.guid and user.organization == key
            ],
        }


def user_shown(user: User) -> dict[str, Any]:
    """A user as `GET /user/{id}` shows it."""
    first, _, last = user.name.partition(" ")
    shown = {
        "_id": user.id,
        "guid": user.guid,
        "user_id": user.id,
        "firstname": first,
        "lastname": last,
        "username": user.email or user.guid,
        "active": True,
        "activated": True,
    }
    return shown if user.email is None else {**shown, "email": user.email}


def team_shown(team: Team) -> dict[str, Any]:
    """A team as `GET /team/{guid}` shows it: no emails."""
    return {
        "guid": team.guid,
        "name": team.name,
        "org_guid": team.organization,
        "default": False,
        "tags": [],
        "users": [{"guid": user.guid, "type": "user", "roles": ["consumer"]} for user in team.users],
    }


def members_shown(team: Team) -> list[dict[str, Any]]:
    """A team's members as `GET /team/{guid}/user` shows them."""
    return [
        {**user_shown(user), "name": user.name, "roles": ["consumer"], "type": "user", "org_roles": []}
        for user in team.users
    ]


def platform_answer(result: Any) -> web.Response:
    """The Platform's success envelope; lists tell their length beside it."""
    body: dict[str, Any] = {"success": True, "result": result}
    if isinstance(result, list):
        count = len(result)
        body["_metadata"] = {
            "count": count,
            "matched": count,
            "page": 1,
            "pages": 1,
            "limit": PAGE_SIZE_MAX,
            "skip": 0,
        }
    return web.json_response(body)


def platform_error(status: int, description: str) -> web.Response:
    """The Platform's failure: HTTP 400 with the true status in `code`."""
    body = {"success": False, "code": status, "description": description}
    return web.json_response(body, status=401 if status == 401 else 400)

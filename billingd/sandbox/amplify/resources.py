"""The stored resources and the index of who refers to whom (amplify.md 2.5)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from billingd.sandbox.amplify.kinds import BY_NAME, Kind

Json = dict[str, Any]


@dataclass(eq=False, slots=True)
class Resource:
    """One resource; `body` is what a GET shows, less what depends on the version asked for."""

    kind: Kind
    body: Json
    scope: "Resource | None" = None

    @property
    def id(self) -> str:
        """`metadata.id`, the stable key."""
        return str(self.body["metadata"]["id"])

    @property
    def name(self) -> str:
        """Unique in its scope, immutable."""
        return str(self.body["name"])

    @property
    def deleting(self) -> bool:
        """Waits for its finalizers or its dependants."""
        return bool(self.body["metadata"].get("state") == "DELETING")

    def link(self, version: str) -> str:
        """`metadata.selfLink`: without /apis (amplify.md 2.1)."""
        if self.scope is None:
            return f"/{self.kind.group}/{version}/{self.kind.plural}/{self.name}"
        return f"{self.scope.link(version)}/{self.kind.plural}/{self.name}"

    def shown(self, version: str) -> Json:
        """As a GET answers it on this version; shares its inner values with `body`."""
        metadata = {**self.body["metadata"], "selfLink": self.link(version)}
        if references := metadata.get("references"):
            metadata["references"] = [
                {**reference, "selfLink": _versioned(reference["selfLink"], version)}
                for reference in references
            ]
        shown = {**self.body, "apiVersion": version, "metadata": metadata}
        if self.kind.name == "Secret":  # a secret's values are kept encrypted and never given back
            shown["spec"] = {"data": dict.fromkeys(self.body["spec"]["data"], "encrypted")}
        return shown


def _versioned(link: str, version: str) -> str:
    group, _, rest = link.removeprefix("/").partition("/")
    return f"/{group}/{version}/{rest.partition('/')[2]}"


class Resources:
    """Every resource by key, by id and by kind."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str, str], Resource] = {}
        self._by_id: dict[str, Resource] = {}
        self._by_kind: dict[str, dict[str, Resource]] = {name: {} for name in BY_NAME}
        self.gone: dict[str, Resource] = {}
        """What was removed, by id: no API shows it, the ledger does."""
        self._dependants: dict[str, dict[str, Resource]] = {}
        self._children: dict[str, dict[str, Resource]] = {}

    def add(self, resource: Resource) -> None:
        """Stores a new resource; its key must be free."""
        self._by_key[self._key(resource)] = resource
        self._by_kind[resource.kind.name][resource.id] = resource
        self._by_id[resource.id] = resource
        self.index(resource)

    def index(self, resource: Resource) -> None:
        """Takes up the references a resource has now."""
        for reference in resource.body["metadata"].get("references", ()):
            self._dependants.setdefault(reference["id"], {})[resource.id] = resource
        if resource.scope is not None:
            self._dependants.setdefault(resource.scope.id, {})[resource.id] = resource
            self._children.setdefault(resource.scope.id, {})[resource.id] = resource

    def remove(self, resource: Resource) -> None:
        """Takes a resource out of every index."""
        self.gone[resource.id] = resource
        del self._by_key[self._key(resource)]
        del self._by_kind[resource.kind.name][resource.id]
        del self._by_id[resource.id]
        self._dependants.pop(resource.id, None)
        self._children.pop(resource.id, None)
        for target in self.targets(resource):
            self._dependants.get(target, {}).pop(resource.id, None)
            self._children.get(target, {}).pop(resource.id, None)

    def find(self, kind: str, name: str, scope: Resource | None = None) -> Resource | None:
        """By name within its scope."""
        return self._by_key.get((kind, scope.id if scope else "", name))

    def get(self, resource_id: str) -> Resource | None:
        """By `metadata.id`, whatever its kind."""
        return self._by_id.get(resource_id)

    def by_id(self, kind: str, resource_id: str) -> Resource | None:
        """By `metadata.id`."""
        return self._by_kind[kind].get(resource_id)

    def either(self, kind: str, name_or_id: str) -> Resource | None:
        """By name or by id, whichever fits; for kinds without a scope."""
        return self.find(kind, name_or_id) or self.by_id(kind, name_or_id)

    def of_kind(self, kind: str, scope: Resource | None = None) -> list[Resource]:
        """All of a kind in the order of their making, in one scope if given."""
        if scope is None:
            return list(self._by_kind[kind].values())
        return [child for child in self._children.get(scope.id, {}).values() if child.kind.name == kind]

    def targets(self, resource: Resource) -> Iterator[str]:
        """Ids of what a resource refers to, its scope included."""
        for reference in resource.body["metadata"].get("references", ()):
            yield reference["id"]
        if resource.scope is not None:
            yield resource.scope.id

    def dependants(self, target: Resource, strength: str) -> list[Resource]:
        """Who refers to `target`: hard (scope included) or soft."""
        found = []
        for dependant in self._dependants.get(target.id, {}).values():
            strengths = {
                reference["type"]
                for reference in dependant.body["metadata"].get("references", ())
                if reference["id"] == target.id
            }
            hard = "hard" in strengths or dependant.scope is target
            if hard is (strength == "hard") and (hard or "soft" in strengths):
                found.append(dependant)
        return found

    @staticmethod
    def _key(resource: Resource) -> tuple[str, str, str]:
        return (resource.kind.name, resource.scope.id if resource.scope else "", resource.name)

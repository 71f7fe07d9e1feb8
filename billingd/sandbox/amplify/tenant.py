"""One Amplify tenant: its resources and every change to them, each of which is an event."""

import uuid
from typing import Any, Final

from billingd.sandbox.amplify import envelope, lifecycle, links
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.journal import Journal
from billingd.sandbox.amplify.kinds import BY_NAME, Kind
from billingd.sandbox.amplify.people import People
from billingd.sandbox.amplify.resources import Json, Resource, Resources
from billingd.sandbox.amplify.settings import Settings
from billingd.sandbox.amplify.times import api_time
from billingd.sandbox.amplify.tokens import Tokens
from billingd.sandbox.amplify.traffic import Traffic
from billingd.sandbox.clock import SandboxClock

MARKETPLACE: Final = "7d7d0000-0000-4000-8000-000000000001"
SERVICE_ACCOUNT: Final = "5a5a0000-0000-4000-8000-000000000001"
_STARTS: Final[dict[str, Json]] = {
    "Product": {"state": "draft", "status": {"level": "Success", "reasons": []}},
    "ProductPlan": {"state": "draft", "status": {"level": "Success", "reasons": []}},
    "Quota": {"status": {"level": "Success", "reasons": []}},
}


class Tenant:
    """The sandbox's Amplify."""

    def __init__(
        self,
        clock: SandboxClock,
        *,
        organization_id: str = "100000000000001",
        client_id: str = "DOSA_sandbox",
        client_secret: str = "sandbox-client-secret",  # noqa: S107 - of the sandbox's own making
    ) -> None:
        self.clock = clock
        self.organization_id = organization_id
        self.settings = Settings()
        self.resources = Resources()
        self.journal = Journal(clock, organization_id)
        self.journal.version = lambda: "v1" if self.settings.versions == "both" else "v1alpha1"
        self.journal.topics = self._topics
        self.people = People(organization_id)
        self.tokens = Tokens(clock, client_id, client_secret, organization_id)
        self.traffic = Traffic(clock)
        self.create("Marketplace", {"name": MARKETPLACE, "title": "Marketplace", "spec": {}})
        self.create("ProductPlanUnit", {"name": "transactions", "title": "Transactions", "spec": {}})

    def create(
        self,
        kind: str,
        sent: object,
        *,
        scope: Resource | None = None,
        version: str = "v1",
        actor: str = SERVICE_ACCOUNT,
    ) -> Resource:
        """POST: a new resource and its `ResourceCreated`; Refused(400, 409)."""
        of = BY_NAME[kind]
        body = envelope.read(of, version, sent)
        if self.resources.find(kind, body["name"], scope) is not None:
            raise Refused(409, f"{kind} '{body['name']}' exists already")
        lifecycle.check_new(self.resources, kind, scope, body)
        resource = Resource(of, self._new_body(of, body, scope, actor), scope)
        resource.body["metadata"]["references"] = links.references(self.resources, kind, resource.body)
        self.resources.add(resource)
        self.journal.record("ResourceCreated", resource)
        return resource

    def replace(self, resource: Resource, sent: object, *, version: str = "v1") -> Resource:
        """PUT of the whole resource; drops what it leaves out; Refused(400, 428)."""
        envelope.check_version(resource, sent)
        body = envelope.read(resource.kind, version, sent, resource)
        lifecycle.check_change(resource, body)
        kept = {key: value for key, value in resource.body.items() if key not in envelope.OWN_FIELDS}
        changed = {**kept, **_own(body)}
        found = links.references(self.resources, resource.kind.name, changed)
        resource.body = changed
        resource.body["metadata"]["references"] = found
        self.resources.index(resource)
        self._touch(resource)
        self.journal.record("ResourceUpdated", resource)
        if resource.deleting and not resource.body["finalizers"]:
            self._finish(resource)
        return resource

    def put_subresource(self, resource: Resource, name: str, sent: object) -> Resource:
        """PUT of one subresource and its `SubResourceUpdated`; Refused(400, 404, 428)."""
        value = envelope.subresource(resource.kind, name, sent)
        envelope.check_version(resource, sent)
        self.set_subresource(resource, name, lifecycle.settled(self.resources, resource, name, value))
        if resource.kind.name == "Subscription" and name == "approval":
            self._after_approval(resource)
        return resource

    def set_subresource(self, resource: Resource, name: str, value: Any) -> None:
        """Writes a subresource as Amplify itself does: no rule is asked."""
        changed = {**resource.body, name: value}
        found = links.references(self.resources, resource.kind.name, changed)
        resource.body[name] = value
        resource.body["metadata"]["references"] = found
        self.resources.index(resource)
        if self.settings.subresource_moves_version:
            self._touch(resource, modified=self.settings.subresource_moves_modified)
        self.journal.record("SubResourceUpdated", resource, name)

    def delete(self, resource: Resource, *, force: bool = False, asked: bool = True) -> bool:
        """DELETE: True when gone, False while finalizers or dependants hold it (amplify.md 2.2, 2.7)."""
        if asked and not force:
            lifecycle.check_removal(self.resources, resource)
        if force:
            resource.body["finalizers"] = []
        for dependant in self.resources.dependants(resource, "hard"):
            if self.resources.get(dependant.id) is dependant and not dependant.deleting:
                self.delete(dependant, asked=False)
        if self._finish(resource):
            return True
        if not resource.deleting:
            resource.body["metadata"]["state"] = "DELETING"
            self._touch(resource)
            self.journal.record("ResourceUpdated", resource)
        return False

    def _topics(self) -> list[Resource]:
        return self.resources.of_kind("WatchTopic")

    def _finish(self, resource: Resource) -> bool:
        if resource.body["finalizers"] or self.resources.dependants(resource, "hard"):
            return False
        for dependant in self.resources.dependants(resource, "soft"):
            links.unlink(dependant, resource)
            self._touch(dependant)
            self.journal.record("ResourceUpdated", dependant)
        targets = set(self.resources.targets(resource))
        self.resources.remove(resource)
        self.journal.record("ResourceDeleted", resource)
        for target in targets:
            waiting = self.resources.get(target)
            if waiting is not None and waiting.deleting:
                self._finish(waiting)
        return True

    def _after_approval(self, subscription: Resource) -> None:
        if subscription.body["approval"]["state"] == "approved" and "state" not in subscription.body:
            now = {"timestamp": api_time(self.clock.now())}
            self.set_subresource(subscription, "state", {"name": "active", "when": now})

    def _new_body(self, kind: Kind, body: Json, scope: Resource | None, actor: str) -> Json:
        now = api_time(self.clock.now())
        metadata: Json = {
            "id": uuid.uuid4().hex,
            "resourceVersion": "1",
            "audit": {
                "createTimestamp": now,
                "createUserId": actor,
                "modifyTimestamp": now,
                "modifyUserId": actor,
            },
            "references": [],
        }
        if scope is not None:
            metadata["scope"] = {"id": scope.id, "kind": scope.kind.name, "name": scope.name}
        start = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in _STARTS.get(kind.name, {}).items()
        }
        return {
            "group": kind.group,
            "apiVersion": "v1",
            "kind": kind.name,
            "name": body["name"],
            "metadata": metadata,
            **_own(body),
            **start,
        }

    def _touch(self, resource: Resource, *, modified: bool = True) -> None:
        metadata = resource.body["metadata"]
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)
        if modified:
            metadata["audit"]["modifyTimestamp"] = api_time(self.clock.now())


def _own(body: Json) -> Json:
    """A body's own fields with their defaults."""
    own: Json = {"title": body["name"], "attributes": {}, "tags": [], "finalizers": [], "spec": {}}
    own.update({key: body[key] for key in envelope.OWN_FIELDS if key in body})
    return own

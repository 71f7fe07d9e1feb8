"""The kinds of resource this Amplify knows: a table (amplify.md 3, 2.4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from billingd.sandbox.amplify import specs
from billingd.sandbox.amplify.schema import Check, free_object

COMMON_FILTERS: Final = frozenset(
    {"name", "title", "tags", "metadata.id", "metadata.state", "metadata.resourceVersion"}
    | {f"metadata.scope.{field}" for field in ("id", "name", "kind")}
    | {f"metadata.references.{field}" for field in ("id", "kind", "name")}
    | {f"metadata.deletedReferences.{field}" for field in ("id", "kind", "name")}
    | {"metadata.references", "metadata.deletedReferences"}
    | {"metadata.audit.createTimestamp", "metadata.audit.modifyTimestamp"}
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: where it lives, what its spec may hold, what may be filtered on."""

    name: str
    group: str
    plural: str
    spec: Check
    scope: str | None = None
    filters: frozenset[str] = frozenset()
    early_v1: bool = False
    """Had a v1 path before everything else moved to v1 in mid-2026 (amplify.md 2.1)."""

    @property
    def subresources(self) -> Mapping[str, Check]:
        """Its named subresources; any kind also takes free extension names."""
        return specs.SUBRESOURCES.get(self.name, {})


KINDS: Final = (
    Kind(
        "Product",
        "catalog",
        "products",
        specs.PRODUCT,
        filters=frozenset({"state", "status.level"}),
        early_v1=True,
    ),
    Kind(
        "ProductPlan",
        "catalog",
        "productplans",
        specs.PLAN,
        filters=frozenset({"state", "spec.type", "status.level"}),
    ),
    Kind(
        "Quota",
        "catalog",
        "quotas",
        specs.QUOTA,
        scope="ProductPlan",
        filters=frozenset({"status.level"}),
        early_v1=True,
    ),
    Kind("ProductPlanUnit", "catalog", "productplanunits", specs.UNIT),
    Kind(
        "Subscription",
        "catalog",
        "subscriptions",
        specs.SUBSCRIPTION,
        filters=frozenset(
            {
                "approval.state",
                "approval.previousState",
                "state.name",
                "state.when.timestamp",
                "status.level",
                "billing.payment.type",
                "marketplace.resource.owner.id",
                "marketplace.resource.owner.organization.id",
            }
        ),
    ),
    Kind("Marketplace", "catalog", "marketplaces", free_object, early_v1=True),
    Kind("Integration", "management", "integrations", specs.INTEGRATION),
    Kind("Webhook", "management", "webhooks", specs.WEBHOOK, scope="Integration"),
    Kind("Secret", "management", "secrets", specs.SECRET, scope="Integration"),
    Kind("ResourceHook", "management", "resourcehooks", specs.RESOURCE_HOOK, scope="Integration"),
    Kind("WatchTopic", "management", "watchtopics", specs.WATCH_TOPIC),
)

BY_NAME: Final[Mapping[str, Kind]] = {kind.name: kind for kind in KINDS}
BY_PLURAL: Final[Mapping[tuple[str, str], Kind]] = {(kind.group, kind.plural): kind for kind in KINDS}


def filterable(kind: Kind, field: str) -> bool:
    """Whether `field` may stand in a query on `kind`."""
    if field in COMMON_FILTERS or field in kind.filters or field.startswith("attributes."):
        return True
    if kind.scope is not None and field.startswith("scopeResource."):
        return filterable(BY_NAME[kind.scope], field.removeprefix("scopeResource."))
    if field.startswith("referencedResources."):
        rest = field.removeprefix("referencedResources.")
        return any(filterable(other, rest) for other in KINDS if not rest.startswith("referencedResources."))
    return False

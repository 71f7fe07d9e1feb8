"""The references each kind makes, as a table (amplify.md 2.5, the graph)."""

from typing import Any, Final, NamedTuple

from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.matching import dig
from billingd.sandbox.amplify.resources import Json, Resource, Resources


class Link(NamedTuple):
    """A field of one kind that names a resource of another."""

    field: str
    target: str
    strength: str


LINKS: Final[dict[str, tuple[Link, ...]]] = {
    "ProductPlan": (Link("spec.product", "Product", "hard"),),
    "Quota": (Link("spec.unit", "ProductPlanUnit", "soft"),),
    "Subscription": (
        Link("spec.plan.name", "ProductPlan", "hard"),
        Link("spec.product", "Product", "hard"),
        Link("marketplace.name", "Marketplace", "hard"),
        Link("references.subscription", "Subscription", "soft"),
    ),
    "ResourceHook": (),
}


def references(resources: Resources, kind: str, body: Json) -> list[Json]:
    """`metadata.references` for a body; Refused(400) where a target does not exist."""
    found = []
    for link in LINKS.get(kind, ()):
        for name in dig(body, link.field):
            target = resources.find(link.target, str(name))
            if target is None:
                raise Refused(400, f"{link.field}: there is no {link.target} '{name}'")
            found.append(_reference(target, link.strength))
    return found


def _reference(target: Resource, strength: str) -> Json:
    return {
        "id": target.id,
        "group": target.kind.group,
        "kind": target.kind.name,
        "name": target.name,
        "type": strength,
        "selfLink": target.link("v1"),
    }


def unlink(dependant: Resource, gone: Resource) -> None:
    """A soft target is gone: nulls the field and notes it under deletedReferences."""
    metadata = dependant.body["metadata"]
    lost = [each for each in metadata["references"] if each["id"] == gone.id]
    metadata["references"] = [each for each in metadata["references"] if each["id"] != gone.id]
    metadata.setdefault("deletedReferences", []).extend(lost)
    for link in LINKS[dependant.kind.name]:
        if link.target == gone.kind.name and link.strength == "soft":
            parent, _, leaf = link.field.rpartition(".")
            holders: list[Any] = dig(dependant.body, parent)
            for holder in holders:
                if holder.get(leaf) == gone.name:
                    holder[leaf] = None

"""Reading a resource a client sends: the common envelope and the kind's spec (amplify.md 2.5)."""

import re
from copy import deepcopy
from typing import Any, Final

from billingd.sandbox.amplify import specs
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.kinds import Kind
from billingd.sandbox.amplify.resources import Json, Resource
from billingd.sandbox.amplify.schema import free_object, items, one_of, struct, text, text_map

OWN_FIELDS: Final = ("title", "attributes", "tags", "owner", "finalizers", "spec")
"""What a PUT of the whole resource writes; subresources in its body are left aside."""
RESERVED: Final = frozenset(
    {"group", "apiVersion", "kind", "name", "title", "metadata", "owner", "finalizers"}
    | {"attributes", "tags", "spec", "languages"}
)
_EXTENSION: Final = re.compile(r"[A-Za-z][-\w]{0,99}")

_fields: Final = {
    "group": text(),
    "apiVersion": text(),
    "kind": text(),
    "name": text(max_length=100, min_length=1, pattern=specs.NAME),
    "title": text(max_length=350),
    "metadata": free_object,
    "owner": struct(
        {"type": one_of("team"), "id": text(min_length=1), "organization": free_object}, "type", "id"
    ),
    "finalizers": items(
        struct(
            {"name": text(min_length=1, max_length=100), "description": text(max_length=350)},
            "name",
        )
    ),
    "attributes": text_map,
    "tags": items(text(min_length=1, max_length=80)),
}


def read(kind: Kind, version: str, sent: object, old: Resource | None = None) -> Json:
    """The writable part of a resource, validated; Refused(400) names every fault."""
    if not isinstance(sent, dict):
        raise Refused(400, "The body must be a JSON object")
    aside = set(kind.subresources) | {"languages"}
    if old is not None:
        aside |= set(old.body)  # a GET's own extensions may come back in a PUT
    body = {key: value for key, value in sent.items() if key in RESERVED or key not in aside}
    body.pop("languages", None)
    whole = struct({**_fields, "spec": kind.spec}, "name", *_spec_required(kind))
    faults = [fault.removeprefix(".") for fault in whole(body, "")]
    for key, expected in (("group", kind.group), ("kind", kind.name), ("apiVersion", version)):
        if body.get(key, expected) != expected:
            faults.append(f"{key}: must be '{expected}' at this path; got '{body[key]}'")
    if old is not None and body.get("name", old.name) != old.name:
        faults.append(f"name: cannot be changed from '{old.name}'")
    if faults:
        raise Refused(400, "; ".join(faults))
    return deepcopy(body)


def _spec_required(kind: Kind) -> tuple[str, ...]:
    return () if kind.name in ("Product", "Marketplace", "ProductPlanUnit", "Integration") else ("spec",)


def subresource(kind: Kind, name: str, sent: object) -> Any:
    """The value in `{"<subresource>": value}`, validated; other parts of the resource may stand beside it."""
    if name in RESERVED or not _EXTENSION.fullmatch(name):
        raise Refused(404, f"'{name}' is not a subresource of {kind.name}")
    if not isinstance(sent, dict) or name not in sent:
        raise Refused(400, f"{name}: the body must be an object with this key")
    beside = set(sent) - RESERVED - set(kind.subresources) - {name}
    if beside:
        raise Refused(400, f"{min(beside)}: unknown property")
    check = kind.subresources.get(name)
    faults = list(check(sent[name], name)) if check is not None else []
    if faults:
        raise Refused(400, "; ".join(faults))
    return deepcopy(sent[name])


def check_version(resource: Resource, sent: object) -> None:
    """Refused(428) where the sender's resourceVersion is stale; absent means the last write wins (2.6)."""
    metadata = sent.get("metadata") if isinstance(sent, dict) else None
    version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    current = resource.body["metadata"]["resourceVersion"]
    if version not in (None, "", current):
        raise Refused(428, f"resourceVersion is {current}, not {version}: read the resource again")

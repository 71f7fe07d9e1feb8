"""Paging, sorting, field selection and filters of a list (amplify.md 2.3, 2.4)."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from billingd.sandbox.amplify import kinds, matching, rsql
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.resources import Json, Resource, Resources
from billingd.sandbox.amplify.settings import PAGE_SIZE, PAGE_SIZE_MAX

SORTABLE: Final = frozenset(
    {
        "name",
        "title",
        "metadata.audit.createTimestamp",
        "metadata.audit.modifyTimestamp",
        "metadata.scope.title",
    }
)


def page_of(params: Mapping[str, str]) -> tuple[int, int]:
    """First index and size of the page asked for."""
    page = _whole(params, "page", 1, 1_000_000)
    size = _whole(params, "pageSize", PAGE_SIZE, PAGE_SIZE_MAX)
    return (page - 1) * size, size


def _whole(params: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise Refused(400, f"{name}: must be a whole number from 1 to {most}; got '{text}'")
    return int(text)


def sort_of(params: Mapping[str, str], allowed: frozenset[str]) -> tuple[str, bool] | None:
    """Field and whether descending, or None."""
    if "sort" not in params:
        return None
    field, _, direction = params["sort"].partition(",")
    if field not in allowed or direction.upper() not in ("", "ASC", "DESC"):
        raise Refused(400, f"sort: cannot sort by '{params['sort']}'")
    return field, direction.upper() == "DESC"


def selected(
    resources: Resources, found: Iterable[Resource], kind: kinds.Kind, params: Mapping[str, str]
) -> list[Resource]:
    """Those of `found` that satisfy `query`, in the order of `sort`."""
    chosen = list(found)
    if text := params.get("query"):
        node = rsql.parse(text)
        for field in rsql.fields(node):
            if not kinds.filterable(kind, field):
                raise Refused(400, f"query: {kind.name} cannot be filtered by '{field}'")
        chosen = [each for each in chosen if matching.matches(node, _lookup(resources, each))]
    if order := sort_of(params, SORTABLE):
        field, descending = order
        chosen.sort(key=lambda each: str(next(iter(matching.dig(each.body, field)), "")), reverse=descending)
    return chosen


def fields_only(shown: Json, params: Mapping[str, str]) -> Json:
    """The top-level fields named by `fields`; unknown names are ignored."""
    if not params.get("fields"):
        return shown
    wanted = {name.strip().partition(".")[0] for name in params["fields"].split(",")}
    return {key: value for key, value in shown.items() if key in wanted}


def _lookup(resources: Resources, resource: Resource) -> matching.Lookup:
    own = matching.attribute_aware(resource.body)

    def lookup(field: str) -> list[Any]:
        if field.startswith("scopeResource.") and resource.scope is not None:
            return list(_lookup(resources, resource.scope)(field.removeprefix("scopeResource.")))
        if field.startswith("referencedResources."):
            rest = field.removeprefix("referencedResources.")
            targets = [resources.get(target) for target in resources.targets(resource)]
            return [value for target in targets if target for value in _lookup(resources, target)(rest)]
        return list(own(field))

    return lookup

"""`application/json-patch+json` with Amplify's four operations (amplify.md 2.6)."""

from copy import deepcopy
from typing import Any, Final

from billingd.sandbox.amplify.errors import Refused

OPERATIONS: Final = frozenset({"add", "replace", "remove", "x-build-object-tree"})


def patched(body: dict[str, Any], operations: object) -> dict[str, Any]:
    """`body` with the operations done, all or none; Refused(400) where one cannot be done."""
    if not isinstance(operations, list) or not operations:
        raise Refused(400, "A patch is a list of at least one operation")
    result = deepcopy(body)
    for number, operation in enumerate(operations):
        _apply(result, operation, f"patch[{number}]")
    return result


def _apply(body: dict[str, Any], operation: object, where: str) -> None:
    if not isinstance(operation, dict) or operation.get("op") not in OPERATIONS:
        raise Refused(400, f"{where}.op: must be one of {', '.join(sorted(OPERATIONS))}")
    path = operation.get("path")
    if not isinstance(path, str) or not path.startswith("/"):
        raise Refused(400, f"{where}.path: must be a JSON pointer that starts with '/'")
    steps = [step.replace("~1", "/").replace("~0", "~") for step in path[1:].split("/")]
    op = operation["op"]
    if op == "x-build-object-tree":
        _build(body, steps, where)
        return
    if op != "remove" and "value" not in operation:
        raise Refused(400, f"{where}.value: is required")
    parent = _parent(body, steps, where)
    if isinstance(parent, list):
        _apply_to_list(parent, steps[-1], op, operation.get("value"), where)
        return
    if op != "add" and steps[-1] not in parent:
        raise Refused(400, f"{where}: {path} does not exist")
    if op == "remove":
        del parent[steps[-1]]
    else:
        parent[steps[-1]] = operation["value"]


def _build(body: dict[str, Any], steps: list[str], where: str) -> None:
    node = body
    for step in steps:
        child = node.get(step)
        if child is None:
            child = node[step] = {}
        if not isinstance(child, dict):
            raise Refused(400, f"{where}: '{step}' is not an object")
        node = child


def _parent(body: dict[str, Any], steps: list[str], where: str) -> dict[str, Any] | list[Any]:
    node: Any = body
    for step in steps[:-1]:
        if isinstance(node, list):
            node = node[_index(step, len(node) - 1, where)]
        elif isinstance(node, dict) and step in node:
            node = node[step]
        else:
            raise Refused(400, f"{where}: '{step}' does not exist")
    if not isinstance(node, dict | list):
        raise Refused(400, f"{where}: the parent is neither an object nor a list")
    return node


def _apply_to_list(parent: list[Any], step: str, op: str, value: object, where: str) -> None:
    if op == "add":
        parent.insert(len(parent) if step == "-" else _index(step, len(parent), where), value)
    elif op == "remove":
        del parent[_index(step, len(parent) - 1, where)]
    else:
        parent[_index(step, len(parent) - 1, where)] = value


def _index(step: str, highest: int, where: str) -> int:
    if not step.isdigit() or int(step) > highest:
        raise Refused(400, f"{where}: no item '{step}'")
    return int(step)

"""Recurly's error answers as exceptions: `{"error": {"type", "message", "params"}}` (OAS schema Error)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class RefusalError(Exception):
    """A request Recurly refuses; `params` are (dotted name, message)."""

    status: int
    type: str
    message: str
    params: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON answer."""
        params = [{"param": name, "message": text} for name, text in self.params]
        return {"error": {"type": self.type, "message": self.message, "params": params, **self.extra}}


def invalid(*params: tuple[str, str], status: int = 422) -> RefusalError:
    """A `validation` error over one or more fields; the message is made as Recurly makes it."""
    message = ", ".join(f"{humanized(name)} {text}" for name, text in params)
    return RefusalError(status, "validation", message, params)


def unprocessable(message: str, *params: tuple[str, str], type_: str = "validation") -> RefusalError:
    """A 422 with a message of its own."""
    return RefusalError(422, type_, message, params)


def not_found(kind: str, key: str, value: str) -> RefusalError:
    """A 404 in Rails' words (recurly-client-node#38)."""
    return RefusalError(404, "not_found", f"Couldn't find {kind} with {key} = {value}")


def bad_values(names: Iterable[str], status: int = 400) -> RefusalError:
    """Values of the wrong kind; the words are those of terminate_subscription's 422 (OAS:21808 ff.)."""
    listed = list(names)
    message = f"Please provide valid values for these parameters: {', '.join(listed)}."
    return RefusalError(status, "validation", message, tuple((name, "is invalid") for name in listed))


def unpermitted(names: Iterable[str]) -> RefusalError:
    """Fields Recurly does not know (recurly-client-node#314)."""
    listed = list(names)
    message = f"Please remove the following unpermitted parameters from your request: {', '.join(listed)}."
    return RefusalError(400, "validation", message, tuple((name, "is not permitted") for name in listed))


def missing_feature(names: Iterable[str]) -> RefusalError:
    """Fields Recurly knows and the sandbox does not carry out: refused, never ignored."""
    listed = list(names)
    message = f"This site does not have the feature needed for: {', '.join(listed)}"
    return unprocessable(message, *((name, "is not available") for name in listed), type_="missing_feature")


def humanized(name: str) -> str:
    """`add_ons.add_on` -> `Add-ons add on`, as in recurly-client-node#314."""
    head, dot, tail = name.partition(".")
    words = "add-ons" if head == "add_ons" else head.replace("_", " ")
    return (words + dot.replace(".", " ") + tail.replace("_", " ").replace(".", " ")).capitalize()

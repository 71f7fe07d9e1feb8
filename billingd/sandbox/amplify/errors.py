"""Refusals as Amplify words them."""

from typing import Any, Final

TITLES: Final = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    410: "Gone",
    415: "Unsupported Media Type",
    428: "Precondition Required",
}


class Refused(Exception):
    """What Amplify answers instead of doing it (amplify.md 2.8)."""

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.headers = headers or {}


def errors_body(status: int, detail: str, tenant_id: str) -> dict[str, Any]:
    """The API Server's error document (amplify.md 2.8)."""
    return {
        "errors": [
            {
                "status": status,
                "title": TITLES.get(status, "Error"),
                "detail": detail,
                "meta": {"tenantId": tenant_id},
            }
        ]
    }

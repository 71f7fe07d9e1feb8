"""A mailbox for notifications sent as Apprise's `json://`."""

from collections import deque
from datetime import datetime
from typing import Any, Final

from billingd.sandbox.asked import Wrong

KEPT: Final = 1000


class Mailbox:
    """What was posted to it, oldest first."""

    def __init__(self) -> None:
        self._letters: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def put(self, letter: object, at: datetime) -> int:
        """Keeps one notification; answers how many there are."""
        if not isinstance(letter, dict) or not isinstance(letter.get("message"), str):
            raise Wrong(
                "message",
                "a notification is an object with a text 'message', as Apprise's json:// sends it",
                "configure the notification URL json://HOST:PORT/control/mailbox",
            )
        self._letters.append({"received_at": at.isoformat(), **letter})
        return len(self._letters)

    def letters(self) -> list[dict[str, Any]]:
        """All that are kept."""
        return list(self._letters)

    def clear(self) -> None:
        """Throws all away."""
        self._letters.clear()

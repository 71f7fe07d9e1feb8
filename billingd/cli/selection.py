"""Which actions a command is about: asked of the daemon, or read from the store."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from billingd.cli.talk import Daemon, Declined
from billingd.domain.attempts import State

if TYPE_CHECKING:
    from billingd.admin.operations import Selection
    from billingd.store.engine import Store

LIST_MAX: Final = 1_000
"""Actions in one listing; the daemon lists no more at once."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Actions by id, or by kind, subject and a text in their last error; `states` bounds both."""

    states: tuple[str, ...]
    kind: str | None = None
    subject: str | None = None
    cause: str | None = None
    limit: int | None = None
    ids: tuple[int, ...] | None = None

    @property
    def named(self) -> dict[str, str]:
        """The filters that are set."""
        filters = {"kind": self.kind, "subject": self.subject, "cause": self.cause}
        return {name: value for name, value in filters.items() if value is not None}

    async def ask(self, daemon: Daemon) -> list[dict[str, Any]]:
        """The actions as the daemon has them."""
        if self.ids is not None:
            found = [await find_at_daemon(daemon, action_id) for action_id in self.ids]
            return [action for action in found if action is not None and self._fits(action)][: self.limit]
        query = [("state", state) for state in self.states] + [("limit", str(self.limit or LIST_MAX))]
        answer = await daemon.get("/outbox", key="actions", query=query + list(self.named.items()))
        actions: list[dict[str, Any]] = answer["actions"]
        return actions

    async def read(self, store: "Store") -> list[dict[str, Any]]:
        """The actions as the store has them."""
        from billingd.admin import operations, status

        rows = await operations.selected(store, self._selection(), limit=self.limit)
        return [status.action_item(row) for row in rows][: self.limit]

    async def replay_at_daemon(self, daemon: Daemon) -> list[int]:
        """Let the daemon try them again; return their ids."""
        if self.states == (State.DEAD,) and self.limit is None:
            wanted: dict[str, Any] = dict(self.named)
            if self.ids is not None:
                wanted["ids"] = list(self.ids)
            return list((await daemon.post("/outbox/replay", wanted, key="replayed"))["replayed"])
        moved = []
        for action in await self.ask(daemon):
            try:
                await daemon.post(f"/outbox/{action['id']}/retry", key="retried")
            except Declined:
                continue  # it moved on since it was listed
            moved.append(int(action["id"]))
        return moved

    async def replay_in_store(self, store: "Store") -> list[int]:
        """Make them due again; return their ids."""
        from billingd.admin import operations

        now = datetime.now(UTC)
        if self.limit is None:
            return await operations.replay(store, self._selection(), now=now)
        ids = [int(action["id"]) for action in await self.read(store)]
        return [action_id for action_id in ids if await operations.retry(store, action_id, now=now)]

    def _selection(self) -> "Selection":
        from billingd.admin.operations import Selection

        return Selection(self.ids, self.kind, self.subject, self.cause, self.states)

    def _fits(self, action: dict[str, Any]) -> bool:
        """What the store's own filters say, of an action asked for by its id."""
        return (
            action["state"] in self.states
            and self.kind in {None, action["kind"]}
            and self.subject in {None, action["subject"]}
            and (self.cause or "").lower() in (action["error"] or "").lower()
        )


async def find_at_daemon(daemon: Daemon, action_id: int) -> dict[str, Any] | None:
    """One action as the daemon has it."""
    try:
        return await daemon.get(f"/outbox/{action_id}", key="state")
    except Declined:
        return None


async def find_in_store(store: "Store", action_id: int) -> dict[str, Any] | None:
    """One action as the store has it."""
    from billingd.admin import status
    from billingd.store import outbox

    async with store.read() as tx:
        row = await outbox.find(tx, action_id)
    return None if row is None else status.action_item(row)

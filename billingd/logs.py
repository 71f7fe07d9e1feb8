"""structlog set-up: events are names with fields, on stderr; JSON unless a person is looking.

Secrets that were named and everybody's e-mail addresses are blotted out of every line, whoever wrote it.
"""

import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final, TextIO

import structlog

from billingd.domain.privacy import HIDDEN, forms, without_addresses

PRIORITIES: Final[Mapping[str, int]] = {
    "critical": 2,
    "error": 3,
    "exception": 3,
    "warning": 4,
    "info": 6,
    "debug": 7,
}
"""journald's, by level."""


class Blotter:
    """A processor: hides secrets and addresses in every value of an event.

    One for the life of the process, for loggers keep the one that they first used.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known: set[str] = set()
        self._secrets: re.Pattern[str] | None = None
        self.learn(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        """Hide these too; a secret that was replaced is still nobody's business."""
        self._known |= set(secrets)
        if known := forms(self._known):
            self._secrets = re.compile("|".join(re.escape(form) for form in known))

    def __call__(
        self, _logger: Any, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        """The event without them."""
        return {name: self._clean(value) for name, value in event.items()}

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            text = value if self._secrets is None else self._secrets.sub(HIDDEN, value)
            return without_addresses(text)
        if isinstance(value, Mapping):
            return {name: self._clean(item) for name, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._clean(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return self._clean(str(value))


CACHED: Final = True
"""Whether a logger keeps what it was configured with at its first use: faster, and once for a process."""


def configure(*, level: str = "info", json: bool | None = None, blotter: Blotter | None = None) -> None:
    """Send billingd's and its libraries' logs to stderr, without what the blotter hides.

    `json` None: JSON unless stderr is a terminal. To journald each line goes with its priority.
    """
    as_json = not sys.stderr.isatty() if json is None else json
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
    )
    last: list[structlog.typing.Processor] = [
        blotter or Blotter(),
        _with_priority(renderer) if to_journal(sys.stderr) else renderer,
    ]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=CACHED,
    )
    foreign = logging.StreamHandler(sys.stderr)
    foreign.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[foreign])
    # Anybody can send broken HTTP, and must not fill the log with it; our own handlers say their faults.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def to_journal(stream: TextIO) -> bool:
    """Whether journald reads this stream itself (systemd names its device and inode)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        there = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(there.st_dev), str(there.st_ino))


def _with_priority(renderer: structlog.typing.Processor) -> structlog.typing.Processor:
    """The same line with the priority in front that journald takes off it: `journalctl -p err` then works."""

    def rendered(logger: Any, method: str, event: structlog.typing.EventDict) -> str:
        priority = PRIORITIES.get(str(event.get("level", method)), 6)
        text = str(renderer(logger, method, event))
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())

    return rendered

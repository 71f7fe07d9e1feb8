"""What the demo says while it works: one line per happening on stderr, coloured only on a terminal."""

import os
import sys
import time
from typing import Final

from rich.console import Console
from rich.text import Text

COLOURS: Final = {
    "Amplify": "cyan",
    "Recurly": "magenta",
    "billingd": "green",
    "operator": "yellow",
    "traffic": "blue",
    "fault": "bold red",
    "demo": "bold",
}
"""Who acts, and in which colour."""

ACTOR_WIDTH: Final = max(map(len, COLOURS))


class Story:
    """Lines with the seconds since the start and who acted."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        terminal = sys.stderr.isatty()
        self._console: Final = (
            Console(stderr=True, highlight=False, no_color=bool(os.environ.get("NO_COLOR")))
            if terminal
            else None
        )

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self._began

    def tell(self, actor: str, what: str) -> None:
        """One happening."""
        moment, who = f"{self.seconds:6.1f}s", f"{actor:<{ACTOR_WIDTH}}"
        if self._console is None:
            sys.stderr.write(f"{moment}  {who}  {what}\n")
            sys.stderr.flush()
            return
        line = Text.assemble((moment, "dim"), "  ", (who, COLOURS.get(actor, "")), "  ", what)
        self._console.print(line, soft_wrap=True)

"""The page for people: one document, made here, that loads nothing from anywhere."""

import base64
import hashlib
from datetime import datetime, timedelta
from importlib import resources
from typing import Any, Final

import jinja2
from markupsafe import Markup

from billingd import __version__
from billingd.admin import chart
from billingd.admin.overview import Seen, Where, read
from billingd.store.engine import Store

UPDATED_EVERY: Final = timedelta(seconds=5)
"""How often the page's script asks for it anew; without script the browser does, six times slower."""

TEXT_MAX: Final = 500
"""Characters of what somebody else wrote, in one place on the page."""

NAMES_MAX: Final = 10_000
"""Characters of a reason that names what its button ends: what is longer is not released from the page."""


def _source(name: str) -> str:
    return (resources.files("billingd.admin") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


class Page:
    """The template, its style and script, and the policy that allows just these two."""

    def __init__(self) -> None:
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("billingd.admin"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {
            "ago": _ago,
            "span": _span,
            "utc": _utc,
            "iso": _iso,
            "plus": _plus,
            "short": _short,
        }
        style, script = _source("page.css"), _source("page.js")
        self.icon = _source("icon.svg")
        self._template = environment.get_template("page.html")
        self._given: dict[str, Any] = {
            "style": Markup(style),  # noqa: S704 (our own file)
            "script": Markup(script),  # noqa: S704
            "version": __version__,
            "text_max": TEXT_MAX,
            "names_max": NAMES_MAX,
            "every": int(UPDATED_EVERY.total_seconds()),
            "drawing": {"width": chart.WIDTH, "height": chart.HEIGHT},
        }
        self.policy = "; ".join(
            (
                "default-src 'none'",
                f"style-src {_hash(style)}",
                f"script-src {_hash(script)}",
                "connect-src 'self'",
                "img-src 'self'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types billingd",
            )
        )

    async def render(self, store: Store, seen: Seen, where: Where) -> str:
        """The page as HTML."""
        document = await read(store, seen, where)
        return self._template.render(self._given | document | {"where": where})


def _utc(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _span(length: timedelta) -> str:
    """A length of time in its largest unit that tells something: `48 s`, `90 min`, `30 h`, `12 days`."""
    seconds = abs(int(length.total_seconds()))
    for size, unit, least in ((86_400, "days", 3), (3_600, "h", 2), (60, "min", 2)):
        if seconds >= size * least:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _ago(moment: datetime, now: datetime) -> str:
    """How long ago that was, or will be."""
    if abs(now - moment) < timedelta(seconds=2):
        return "just now"
    return f"{_span(now - moment)} ago" if moment <= now else f"in {_span(moment - now)}"


def _short(text: str, at_most: int = TEXT_MAX) -> str:
    """The beginning of a text that may be endless; the commands show all of it."""
    return text if len(text) <= at_most else f"{text[:at_most]}…"


def _plus(number: int, more: bool) -> str:
    return f"{number:,}{'+' if more else ''}"


_FILTERS: Final = {"ago": _ago, "span": _span, "utc": _utc, "iso": _iso, "plus": _plus, "short": _short}

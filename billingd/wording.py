"""The words of notices: a template per topic, packaged ones and over them the operator's own.

A template is a file `TOPIC.txt`: its first line is the title, the rest the body, in Jinja's language. One
that fails when a notice is sent is logged, and the packaged one takes its place: no notice is lost.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jinja2
import structlog
from jinja2.sandbox import SandboxedEnvironment

from billingd.domain.notices import DIGEST, PLAIN

log = structlog.get_logger()

PACKAGED: Final = Path(__file__).parent / "notices"
SUFFIX: Final = ".txt"
TEMPLATE_BYTES_MAX: Final = 65_536

_TEXT: Final = {"title": "Plan Metered is held, not billed", "body": "Its prices need three decimals."}
_SINCE: Final = "2026-11-22 10:00 UTC"

SAMPLES: Final[Mapping[str, Mapping[str, Any]]] = {
    PLAIN: {**_TEXT, "topic": "held"},
    DIGEST: {"notices": [{**_TEXT, "topic": "held"}, {**_TEXT, "topic": "plan_linked"}]},
    "dead_letters_begun": {
        "total": 3,
        "groups": [{"kind": "report_usage", "cause": "Recurly answered 422", "count": 3}],
        "since": _SINCE,
        "grown": False,
    },
    "dead_letters_over": {"since": _SINCE, "until": _SINCE, "grown": False},
    "far_side_begun": {"side": "Recurly", "error": "no answer", "since": _SINCE, "grown": False},
    "far_side_over": {"side": "Recurly", "since": _SINCE, "until": _SINCE, "grown": False},
    "store_begun": {"error": "the disk is full", "since": _SINCE, "grown": False},
    "store_over": {"error": "the disk is full", "since": _SINCE, "until": _SINCE, "grown": False},
    "loops_begun": {"loops": ["traffic"], "since": _SINCE, "grown": False},
    "loops_over": {"since": _SINCE, "until": _SINCE, "grown": False},
    "held_over": {"since": _SINCE, "until": _SINCE, "grown": False},
    "subscription_approved": {
        "name": "Ann",
        "subscription": "Weather for Acme",
        "plan": "metered",
        "marketplace_url": "https://market.example.com",
    },
}
"""Every packaged template with facts such as it is given: what `check-config` tries templates with."""

PLAIN_TOPICS: Final = frozenset(
    {
        "adoption",
        "canceled_at_recurly",
        "drift",
        "gone_adopted",
        "held",
        "idempotency_doubted",
        "idempotency_ignored",
        "not_renamed",
        "plan_linked",
        "plan_removed",
        "quota_gone",
        "quota_linked",
        "reactivated",
        "rejected",
        "restored",
        "subscription_ended",
        "subscription_linked",
        "subscription_resumed",
    }
)
"""Topics whose notices bring a title and a body: an operator may have a template for each of them too."""


class Wording:
    """Chooses the words of a notice; `directory` has the operator's own, or is None."""

    def __init__(self, directory: Path | None) -> None:
        self._packaged = _environment()
        self._own = _environment()
        self._directory = directory

    def words(self, topic: str, facts: Mapping[str, Any]) -> tuple[str, str]:
        """Title and body of a notice."""
        for name in (topic, PLAIN) if "title" in facts else (topic,):
            path = None if self._directory is None else self._directory / f"{name}{SUFFIX}"
            if path is not None and path.is_file():
                try:
                    return _rendered(self._own, path, facts)
                except (
                    jinja2.TemplateError,
                    ArithmeticError,
                    LookupError,
                    TypeError,
                    ValueError,
                    OSError,
                ) as error:
                    log.error("notice.template_failed", template=str(path), error=_said(error))
            if (PACKAGED / f"{name}{SUFFIX}").is_file():
                return _rendered(self._packaged, PACKAGED / f"{name}{SUFFIX}", facts)
        return topic.replace("_", " "), ", ".join(f"{name}: {value}" for name, value in facts.items())


def faults(directory: Path) -> list[str]:
    """What is wrong with an operator's templates: unknown topics, what cannot be used."""
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == SUFFIX)
    except OSError as error:
        return [f"{directory} cannot be read: {error.strerror}"]
    found = []
    for path in paths:
        if path.stem not in SAMPLES and path.stem not in PLAIN_TOPICS:
            known = ", ".join(sorted({*SAMPLES, *PLAIN_TOPICS}))
            found.append(f"{path}: no notice has the topic {path.stem!r}; there are {known}")
            continue
        sample = SAMPLES.get(path.stem, {**_TEXT, "topic": path.stem})
        try:
            for grown in (False, True):
                facts = {**sample, "grown": grown} if "grown" in sample else sample
                title, _ = _rendered(_environment(), path, facts)
                if not title:
                    raise ValueError("its first line, the title, is empty")
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, OSError) as error:
            facts_known = ", ".join(sorted(sample))
            found.append(f"{path}: {_said(error)} (it may use {facts_known})")
    return found


def listed(directory: Path | None) -> list[dict[str, Any]]:
    """Every topic with the facts its template may use, and whose template is in use."""
    rows = []
    for topic in sorted({*SAMPLES, *PLAIN_TOPICS}):
        own = None if directory is None else directory / f"{topic}{SUFFIX}"
        there = own is not None and own.is_file()
        packaged = "packaged" if topic in SAMPLES else f"packaged ({PLAIN})"
        facts = sorted(SAMPLES.get(topic, SAMPLES[PLAIN]))
        rows.append({"topic": topic, "facts": facts, "from": str(own) if there else packaged})
    return rows


def _environment() -> SandboxedEnvironment:
    # no page: mail and chat take the text as it is
    return SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False
    )


def _rendered(environment: SandboxedEnvironment, path: Path, facts: Mapping[str, Any]) -> tuple[str, str]:
    if path.stat().st_size > TEMPLATE_BYTES_MAX:
        raise ValueError(f"it is larger than {TEMPLATE_BYTES_MAX} bytes")
    text = environment.from_string(path.read_text(encoding="utf-8")).render(**facts)
    title, _, body = text.strip().partition("\n")
    return title.strip(), body.strip()


def _said(error: Exception) -> str:
    line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{line}{error or type(error).__name__}"

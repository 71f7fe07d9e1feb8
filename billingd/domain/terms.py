"""Amplify's billing interval, term and cycles -> Recurly's interval, cycles and renewal, or why not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from billingd.domain.catalog import ProductPlan

IntervalUnit = Literal["days", "months"]

INTERVALS: Final[dict[str, tuple[IntervalUnit, int]]] = {
    "daily": ("days", 1),
    "weekly": ("days", 7),
    "monthly": ("months", 1),
    "annually": ("months", 12),
}
"""Amplify's billing interval as Recurly's unit and length (recurly.md 8)."""

TERMS: Final[dict[str, tuple[IntervalUnit, int]]] = {
    "days": ("days", 1),
    "months": ("months", 1),
    "years": ("months", 12),
}
"""Amplify's unit of a term in the units of Recurly's interval."""


@dataclass(frozen=True, slots=True)
class Terms:
    """When and how long a plan is billed, in Recurly's words."""

    interval_unit: IntervalUnit
    interval_length: int
    total_billing_cycles: int | None
    auto_renew: bool


def translate_terms(plan: ProductPlan) -> Terms | tuple[str, ...]:
    """The plan's billing period and term in Recurly's words, or clauses that say why there are none.

    Without a term the plan is continuous and renews itself. A term must hold a whole number of billing
    periods, which becomes `total_billing_cycles`; it renews if `renewal` is automatic. `cycles` counts terms
    (without a term: billing periods) after which Amplify archives the subscription (amplify.md 3.2, 9), so it
    multiplies `total_billing_cycles` and ends the renewing.
    """
    faults: list[str] = []
    if plan.interval not in INTERVALS:
        faults.append(
            f"it is billed {_quoted(plan.interval)}, and Recurly can follow only {_or(INTERVALS)}. "
            "Choose one of these."
        )
    if plan.cycles is not None and plan.cycles < 1:
        faults.append(f"it ends after {plan.cycles} terms. Let it have at least 1, or no end.")
    if plan.term is not None and plan.term.type not in TERMS:
        faults.append(
            f"the term is counted in {_quoted(plan.term.type)} instead of {_or(TERMS)}. Mend the term."
        )
    if plan.term is not None and plan.term.length < 1:
        faults.append(f"the term is {plan.term.length} {plan.term.type} long. Make it at least 1.")
    if plan.term is not None and plan.renewal not in (None, "", "automatic"):
        faults.append(f'nothing says what renewal "{plan.renewal}" means. Make it automatic, or none.')
    if faults or plan.interval is None:
        return tuple(faults)
    unit, length = INTERVALS[plan.interval]
    if plan.term is None:
        return Terms(unit, length, plan.cycles, auto_renew=plan.cycles is None)
    term_unit, factor = TERMS[plan.term.type]
    periods, rest = divmod(plan.term.length * factor, length)
    counted = plan.term.type.removesuffix("s") if plan.term.length == 1 else plan.term.type
    if term_unit != unit or rest:
        return (
            f"a term of {plan.term.length} {counted} is not a whole number of billing periods, "
            f"as the plan is billed {plan.interval}. Choose a term that is.",
        )
    if plan.cycles is None:
        return Terms(unit, length, periods, auto_renew=plan.renewal == "automatic")
    return Terms(unit, length, periods * plan.cycles, auto_renew=False)


def _quoted(word: str | None) -> str:
    return "at no interval" if word is None else f'"{word}"'


def _or(words: Mapping[str, object]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"

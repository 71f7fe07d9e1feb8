"""When a trouble is told, and how dead letters are put together."""

from datetime import timedelta

from manual_clock import START

from billingd.domain.notices import (
    AGAIN_AFTER,
    Standing,
    Step,
    Trouble,
    cause_of,
    grouped,
    next_step,
    topic_of,
)

PATIENCE = timedelta(minutes=10)
SECOND = timedelta(seconds=1)


def test_a_trouble_is_told_once_it_has_lasted_and_when_it_is_over() -> None:
    trouble = Trouble("away", size=1)
    first = next_step(trouble, None, now=START, patience=PATIENCE)
    assert first == Step(Standing(START))
    assert next_step(trouble, Standing(START), now=START + PATIENCE - SECOND, patience=PATIENCE).tell is None
    begun = next_step(trouble, Standing(START), now=START + PATIENCE, patience=PATIENCE)
    assert begun == Step(Standing(START, START + PATIENCE, 1), "begun")
    later = START + timedelta(days=3)
    assert next_step(trouble, begun.standing, now=later, patience=PATIENCE) == Step(begun.standing)
    assert next_step(None, begun.standing, now=later, patience=PATIENCE) == Step(None, "over")


def test_what_nobody_was_told_of_is_over_in_silence() -> None:
    assert next_step(None, None, now=START, patience=PATIENCE) == Step(None)
    assert next_step(None, Standing(START), now=START + SECOND, patience=PATIENCE) == Step(None)


def test_what_grows_is_told_again_but_not_at_once() -> None:
    told = Standing(START, START, 5)
    larger, same = Trouble("dead", size=6), Trouble("dead", size=5)
    soon, late = START + AGAIN_AFTER - SECOND, START + AGAIN_AFTER
    assert next_step(larger, told, now=soon, patience=PATIENCE).tell is None
    assert next_step(larger, told, now=late, patience=PATIENCE) == Step(Standing(START, late, 6), "grown")
    assert next_step(same, told, now=late, patience=PATIENCE).tell is None


def test_dead_letters_are_grouped_by_kind_and_cause() -> None:
    """Ids, amounts and requests make no cause of their own; what is rare is put together at the end."""
    dead: list[tuple[str, str | None]] = [
        ("report_usage", f"Unknown: create_usage bd1:{n:04x}9: no answer [request 7f{n}]") for n in range(300)
    ]
    dead += [("provision_plan", "Refused: 422 validation: too long")] * 2 + [("end_subscription", None)]
    first, second, third = grouped(dead)
    assert (first["kind"], first["count"]) == ("report_usage", 300)
    assert first["cause"] == "Unknown: create_usage bd1:…: no answer"
    assert (second["count"], third["cause"]) == (2, "no error was kept")
    assert [one["count"] for one in grouped(dead, at_most=1)] == [300, 3]
    assert len(cause_of("x y " * 200)) == 160


def test_a_key_says_what_a_notice_is_about() -> None:
    assert topic_of("plan-linked:8ac9") == "plan_linked"

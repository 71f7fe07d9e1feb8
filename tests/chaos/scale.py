"""How much of the chaos programme is run: a little of each part by default, all of it under `make chaos`.

`BILLINGD_CHAOS=full` chooses the whole of it; `BILLINGD_CHAOS_KILLS` and the like override one number. Cut
long parts into tests of a minute or two, each with seeds of its own: that is the progress people see, and
what two workers share.
"""

import os
import shlex

FULL = os.environ.get("BILLINGD_CHAOS", "") == "full"


def kills(quick: int, full: int) -> int:
    """How many processes are killed (`KILLS=`)."""
    return _number("KILLS", quick, full)


def seeds(quick: int, full: int) -> int:
    """How many seeds are played (`SEEDS=`)."""
    return _number("SEEDS", quick, full)


def days(quick: int, full: int) -> int:
    """How many virtual days each seed lives (`DAYS=`)."""
    return _number("DAYS", quick, full)


def pairs(quick: int, full: int) -> int:
    """How many pairs of crash points (`PAIRS=`)."""
    return _number("PAIRS", quick, full)


def seed() -> int | None:
    """The one seed that is asked for (`SEED=`), or None for all of them."""
    said = os.environ.get("BILLINGD_CHAOS_SEED", "")
    return int(said) if said else None


def seed_range(quick: int, full: int) -> range:
    """The seeds to play: from 1 on, or only the one that is asked for."""
    only = seed()
    return range(1, seeds(quick, full) + 1) if only is None else range(only, only + 1)


def again(nodeid: str, **only: object) -> str:
    """The command that plays a test again as it was played now, or `only` one POINT, CELL or COMMIT of it."""
    said = {name: value for name, value in os.environ.items() if name.startswith("BILLINGD_CHAOS") and value}
    said |= {f"BILLINGD_CHAOS_{name}": f"{value}" for name, value in only.items()}
    variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(said.items())]
    return " ".join([*variables, ".venv/bin/python -m pytest -n0", shlex.quote(nodeid)])


def only(name: str) -> str:
    """The one POINT, CELL or COMMIT that is asked for, or nothing."""
    return os.environ.get(f"BILLINGD_CHAOS_{name}", "")


def _number(name: str, quick: int, full: int) -> int:
    said = os.environ.get(f"BILLINGD_CHAOS_{name}", "")
    return int(said) if said else full if FULL else quick

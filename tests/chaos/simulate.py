"""Replays one seed of the simulation, with all that happened in it: `simulate.py --seed 17 --days 3`."""

import argparse
import dataclasses
import sys
import time

from sim_bench import Bench
from sim_life import Ingredients


def main() -> int:
    """Run the seed; 1 when the oracle finds something wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--days", type=float, default=3)
    parser.add_argument("--density", type=float, default=1.0, help="how much of everything happens in a day")
    parser.add_argument("--quiet", action="store_true", help="only what the oracle says")
    parser.add_argument("--digest", action="store_true", help="only a digest of all that happened")
    parser.add_argument("--lost-mail", type=float, default=0, help="the share of webhooks that never come")
    parser.add_argument("--away", action="store_true", help="the daemon is down for days")
    parser.add_argument("--without", action="append", default=[], metavar="INGREDIENT")
    parser.add_argument("--count", type=int, default=1, help="so many seeds from this one on")
    given = parser.parse_args()
    ingredients = dataclasses.replace(
        Ingredients(density=given.density, lost_mail=given.lost_mail, away=given.away),
        **dict.fromkeys(given.without, False),
    )
    bench = Bench()
    wrong = 0
    try:
        for seed in range(given.seed, given.seed + given.count):
            began = time.process_time()
            result = bench.run(
                seed, given.days, ingredients, tracing=not (given.quiet or given.digest) and given.count == 1
            )
            took = time.process_time() - began
            out = sys.stdout.write
            if given.digest:
                out(f"{result.digest}\n")
                continue
            for line in result.trace:
                out(line + "\n")
            counts = ", ".join(f"{count} {what}" for what, count in sorted(result.counts.items()))
            out(f"seed {seed}: {counts}; {took:.2f} s; digest {result.digest}\n")
            for fault in result.faults:
                out(f"  WRONG: {fault}\n")
            wrong += bool(result.faults)
    finally:
        bench.close()
    if given.count > 1:
        sys.stdout.write(f"{wrong} of {given.count} seeds wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

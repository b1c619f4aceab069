"""`python -m tests.fuzz [PAIRS [SEED]]`: fuzz, and show how far it is; exit 1 on any fault."""

import os
import sys
import time

from tests.fuzz.campaign import campaign


def main(pairs: int = 20_000, first: int = 0) -> int:
    """Run a campaign on all cores; print each new kind of fault as soon as it is found."""
    start = time.monotonic()
    known: set[object] = set()
    for tally in campaign(pairs, first, os.cpu_count() or 1):
        print(
            f"{tally.pairs} of {pairs} pairs, {time.monotonic() - start:.0f} s: {tally}", flush=True
        )
        for kind in tally.failures.keys() - known:
            spec, name, fault = tally.failures[kind]
            print(f"FAULT {fault}\n  judge({spec!r}, ({name!r},))", flush=True)
        known = set(tally.failures)
    for reason, count in tally.refusals.most_common():
        print(f"refused {count} times: {reason}")
    print(tally.report() if tally.failures else f"no fault in {tally}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

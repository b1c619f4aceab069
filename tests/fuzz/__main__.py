"""`python -m tests.fuzz [PAIRS [SEED]]`: fuzz, and show how far it is; exit 1 on any fault."""

import sys
import time

import torch

from tests.fuzz.campaign import campaign


def main(pairs: int = 20_000, first: int = 0) -> int:
    """Run a campaign; print each new kind of fault as soon as it is found."""
    torch.set_num_threads(1)
    known = 0
    for tally in campaign(pairs, first):
        spent = f"{time.process_time():.0f} s CPU"
        print(f"{tally.pairs} of {pairs} pairs, {spent}: {tally}", flush=True)
        for spec, name, fault in list(tally.failures.values())[known:]:
            print(f"FAULT {fault}\n  judge({spec!r}, ({name!r},))", flush=True)
        known = len(tally.failures)
    for reason, count in tally.refusals.most_common():
        print(f"refused {count} times: {reason}")
    print(tally.report() if tally.failures else f"no fault in {tally}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

"""``make bench``: what the bundle does, beside the raw loops."""

from __future__ import annotations

import argparse

from benchmarks import intake, replay
from benchmarks.bed import Bed
from benchmarks.cost import load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of raw and ours (default: %(default)s)")
    parser.add_argument("--records", type=int, default=50_000, help="of a measurement (default: %(default)s)")
    parser.add_argument("only", nargs="*", help="intake, replay, drain (default: all)")
    arguments = parser.parse_args()
    chosen = arguments.only or ["intake", "replay"]
    sections = {"intake": intake.run, "replay": replay.run}
    with Bed() as bed:
        for name in chosen:
            print(load(), flush=True)
            print(sections[name](bed, records=arguments.records, rounds=arguments.rounds), flush=True)


if __name__ == "__main__":
    main()

"""``make bench``: what the bundle does, beside the raw loops."""

from __future__ import annotations

import argparse

from benchmarks import classify, dag, drain, fingerprints, intake, replay, sqs, steps
from benchmarks.bed import Bed
from benchmarks.cost import load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of raw and ours (default: %(default)s)")
    parser.add_argument("--records", type=int, default=50_000, help="of a measurement (default: %(default)s)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[100_000, 1_000_000],
        help="entries of a whole drain (default: 100,000 and 1,000,000: a quarter of an hour, 3 GB of disk)",
    )
    parser.add_argument(
        "only",
        nargs="*",
        help="fingerprints, classify, steps, sqs, intake, replay, drain, dag (default: all); see also --help of "
        "python -m benchmarks.fingerprints",
    )
    arguments = parser.parse_args()
    chosen = arguments.only or [
        "fingerprints",
        "classify",
        "steps",
        "sqs",
        "intake",
        "replay",
        "drain",
        "dag",
    ]
    if "fingerprints" in chosen:
        print(load(), fingerprints.run(range(arguments.rounds), ()), sep="\n", flush=True)
    if "classify" in chosen:
        print(load(), classify.run(arguments.records, arguments.rounds), sep="\n", flush=True)
    if "steps" in chosen:
        print(load(), steps.run(arguments.records, arguments.rounds), sep="\n", flush=True)
    if "sqs" in chosen:
        print(load(), sqs.run(records=arguments.records // 5, rounds=arguments.rounds), sep="\n", flush=True)
    pairs = {"intake": intake.run, "replay": replay.run}
    if not {"drain", "dag", *pairs} & set(chosen):
        return
    with Bed() as bed:
        for name in (each for each in chosen if each in pairs):
            print(load(), flush=True)
            print(pairs[name](bed, records=arguments.records, rounds=arguments.rounds), flush=True)
        if "drain" in chosen:
            print(load(), drain.run(bed, arguments.sizes, (1, 2)), sep="\n", flush=True)
        if "dag" in chosen:
            print(load(), dag.run(bed, min(arguments.sizes)), sep="\n", flush=True)


if __name__ == "__main__":
    main()

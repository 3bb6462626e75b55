"""Runs benchmarks and writes them into docs/benchmarks: `python benchmarks/run.py [--quick] [NAME …]`.

--quick makes all of them end within minutes: smaller, fewer rounds, printed and not written.
"""

import argparse
import importlib
import time

NAMES = (
    "where_time_goes",
    "set_metrics",
    "evaluation_memory",
    "loop_cost",
    "quantizers",
    "tokenizer_step",
    "tokenizer_quality",
    "tokenizer_quality_colour",
    "decoding",
    "prior_step",
    "prior_likelihood",
    "editing",
    "denoising",
    "samplers",
    "glue",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help=f"any of {', '.join(NAMES)}; by default all")
    parser.add_argument("--quick", action="store_true", help="smaller, some minutes in all; nothing is written")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; expected any of {', '.join(NAMES)}")
    for name in arguments.names:
        begin = time.perf_counter()
        report = importlib.import_module(name).run(arguments.quick)
        if not arguments.quick:
            report.publish()
        print(f"\n{report.page()}\n{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

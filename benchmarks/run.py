"""Run benchmarks and write their reports to docs/benchmarks: `python benchmarks/run.py [--quick] [NAME …]`.

With --quick all benchmarks are smaller and have fewer rounds: they take some minutes, and their reports are only printed.
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
    "baseline",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help=f"any of {', '.join(NAMES)}; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="smaller benchmarks, some minutes in total; nothing is written"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; expected any of {', '.join(NAMES)}")
    for name in arguments.names:
        begin = time.perf_counter()
        report = importlib.import_module(name).run(arguments.quick)
        if not arguments.quick:
            report.publish()
        print(f"\n{report.format_page()}\n{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

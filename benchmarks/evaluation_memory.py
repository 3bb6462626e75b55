"""Peak memory of `latentloom evaluate` at 2,000 and at 50,000 images.

The command runs in its own process on the embedded images with the features of the reference classifier. It evaluates images
from an `.npz` file. The peak is the largest resident set size that the system recorded. The images are noise, because memory
does not depend on their content.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from frame import Report, markdown_table

from latentloom.data.embedded import FASHION_MNIST
from pipelines.evaluation.image_arrays import write_and_yield

COUNTS = (2_000, 50_000)
PEAK = "import resource, sys; from latentloom.cli import main; status = main(sys.argv[1:]); " + (
    "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
)


def measure_peak_mib(count: int, folder: Path) -> float:
    """Return the peak memory in MiB of an evaluation of `count` images."""
    path, generator = folder / f"{count}.npz", torch.Generator().manual_seed(0)
    batches = (
        torch.randint(256, (size, 1, 28, 28), dtype=torch.uint8, generator=generator)
        for size in [1000] * (count // 1000)
    )
    for _ in write_and_yield(path, batches, count):
        pass
    command = ["evaluate", "--samples", path, "--reference", FASHION_MNIST]
    process = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"LATENTLOOM_CACHE": str(folder)},
    )
    if process.returncode:
        raise SystemExit(process.stderr)
    return int(process.stderr.split("peak")[1]) / 1024


def run(quick: bool) -> Report:
    counts = (1_000, 4_000) if quick else COUNTS
    with TemporaryDirectory() as temporary:
        measure_peak_mib(1_000, Path(temporary))  # afterwards the features of the reference images are cached
        peaks = {count: measure_peak_mib(count, Path(temporary)) for count in counts}
    small, large = peaks.values()
    text = "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            markdown_table(["images", "peak, MiB"], [[count, peak] for count, peak in peaks.items()]),
            f"Difference: {large / small - 1:.1%}.",
        ]
    )
    return Report("evaluation_memory", "Memory of an evaluation", text, {"peak_mib": peaks})

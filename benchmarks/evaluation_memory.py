"""Peak memory of `latentloom evaluate` at 2,000 and at 50,000 images.

The command runs in its own process on the embedded images, with the features of the reference classifier, and measures images
that it reads from an `.npz` file. The peak is the largest resident set that the system recorded. The images are noise, since
memory does not depend on their content.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from frame import Report, table

from latentloom.data.embedded import FASHION_MNIST
from pipelines.evaluation.image_arrays import write_and_yield

COUNTS = (2_000, 50_000)
PEAK = "import resource, sys; from latentloom.cli import main; status = main(sys.argv[1:]); " + (
    "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
)


def peak_mib(count: int, folder: Path) -> float:
    path, generator = folder / f"{count}.npz", torch.Generator().manual_seed(0)
    batches = (
        torch.randint(256, (size, 1, 28, 28), dtype=torch.uint8, generator=generator)
        for size in [1000] * (count // 1000)
    )
    for _ in write_and_yield(path, batches, count):
        pass
    command = ["evaluate", "--samples", path, "--reference", FASHION_MNIST]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"LATENTLOOM_CACHE": str(folder)},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stderr.split("peak")[1]) / 1024


def run(quick: bool) -> Report:
    counts = (1_000, 4_000) if quick else COUNTS
    with TemporaryDirectory() as temporary:
        peak_mib(1_000, Path(temporary))  # the features of the reference are there from here on
        peaks = {count: peak_mib(count, Path(temporary)) for count in counts}
    small, large = peaks.values()
    text = "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            table(["images", "peak, MiB"], [[count, peak] for count, peak in peaks.items()]),
            f"Difference: {large / small - 1:.1%}.",
        ]
    )
    return Report("evaluation_memory", "Memory of an evaluation", text, {"peak_mib": peaks})

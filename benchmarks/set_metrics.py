"""Distances between two sets of features compared with torch-fidelity, on the same arrays.

Each set has N rows of F numbers, and the second set is slightly different from the first. The kernel distance uses the whole
sets once, so that both libraries compute the same number. Precision and recall use k = 3.
"""

from collections.abc import Callable
from typing import Any

import torch
from frame import OURS, Report, compare_times, markdown_table, time_interleaved
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.kernel_distance import kernel_distance
from pipelines.evaluation.manifolds import precision_recall

PEER = "torch-fidelity"
SIZES = ((2_000, 1280), (5_000, 1280), (2_000, 2048))


def make_features(count: int, columns: int) -> tuple[Tensor, Tensor]:
    """Draw two feature sets (N, F), non-negative and with falling variance like pooled activations."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(1, 0.05, columns)
    first, second = (torch.randn(count, columns, generator=generator).relu() * scales for _ in range(2))
    return first, second + 0.02


def contenders(a: Tensor, b: Tensor) -> dict[str, dict[str, Callable[[], float]]]:
    """Return our function and the peer's for each metric of the sets `a` and `b`."""
    quiet: dict[str, Any] = {"verbose": False}

    def their_kid() -> float:
        size = {"kid_subsets": 1, "kid_subset_size": len(a), "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
        kernel = {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 0}
        return kid_features_to_metric(a, b, **size, **kernel, **quiet)["kernel_inception_distance_mean"]

    def their_fid() -> float:
        statistics = fid_features_to_statistics(a), fid_features_to_statistics(b)
        return fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]

    def their_prc() -> float:
        metrics = prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, **quiet)
        return metrics["precision"] + metrics["recall"]

    return {
        "Fréchet distance": {OURS: lambda: frechet_distance(a, b), PEER: their_fid},
        "kernel distance": {OURS: lambda: kernel_distance(a, b, subsets=1, subset_size=len(a)).mean, PEER: their_kid},
        "precision and recall": {OURS: lambda: sum(precision_recall(b, a)), PEER: their_prc},
    }


def run(quick: bool) -> Report:
    rows, results = [], []
    for count, columns in SIZES[:1] if quick else SIZES:
        for name, functions in contenders(*make_features(count, columns)).items():
            values = {contender: compute() for contender, compute in functions.items()}
            times = compare_times(time_interleaved(functions, rounds=2 if quick else 3, warm_up=0))
            low, high = times[PEER]["quartiles"]
            difference = abs(values[OURS] / values[PEER] - 1)
            rows.append(
                [
                    name,
                    f"{count:,} × {columns:,}",
                    times[OURS]["seconds"],
                    times[PEER]["seconds"],
                    f"{times[PEER]['ratio']:.2f} ({low:.2f} … {high:.2f})",
                    f"{difference:.0e}",
                ]
            )
            results.append({"metric": name, "count": count, "columns": columns, "values": values, "timing": times})
    head = ["", "N × F", "ours, s", "torch-fidelity, s", "ratio (quartiles)", "relative difference"]
    text = f"{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{markdown_table(head, rows)}"
    return Report("set_metrics", "Distances between sets of features", text, {"rows": results}, ["torch-fidelity"])

"""What an evaluation of the network buys: distance of samples against evaluations, for every sampler and for a mean flow.

`diffusion-tiny` on the latents of `kl-f8` for the embedded images. Each sampler uses the recipe's guidance and as many steps
as the number of evaluations allows. (DDIM with η = 0 equals Euler.) A guided evaluation, a batch with twice the images,
counts once. Heun takes two evaluations for each step but the last, so it has one evaluation fewer where the number is even.
The mean flow is `diffusion-tiny-few-steps`, trained for about as long and sampled as in its recipe, without a doubled batch.
Images and noise are the same for all. The Fréchet distance is on the reference classifier's features, from the test images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from frame import Report, table
from quickstart_codes import codes_folder, trained_prior
from tokenizer_quality import BenchmarkImages, benchmark_images

from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.linear_probe import class_agreement
from pipelines.evaluation.pipeline_metrics import balanced_labels
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from stage2_prior.diffusion.sampling import SamplerName

EVALUATIONS = (1, 2, 4, 8, 16, 25, 50, 250)
MEAN_FLOW = "mean flow"


def steps_of(sampler: str, evaluations: int) -> int:
    """As many as fit into the evaluations, and one at least."""
    return (evaluations + 1) // 2 if sampler == "heun" else evaluations


def measured(
    pipeline: LatentGenerationPipeline, pictures: BenchmarkImages, count: int, seed: int, **options: Any
) -> dict[str, float]:
    labels = balanced_labels(pipeline, count)
    drawn = pipeline.sample_pixels(labels, torch.Generator().manual_seed(seed), batch_size=250, **options)
    seen = pictures.extractor.extract(to_uint8(drawn))
    return {
        "frechet": frechet_distance(seen.features, pictures.real),
        "agreement": class_agreement(seen.class_logits, labels),
    }


def run(quick: bool) -> Report:
    share, count, seed = (0.02, 100, 0) if quick else (1.0, 500, 0)
    evaluations = EVALUATIONS[:3] if quick else EVALUATIONS
    codes, pictures = codes_folder(share, seed, "kl-f8"), benchmark_images("embedded")
    flow, mean_flow = (
        LatentGenerationPipeline.from_pretrained(trained_prior(codes, name, share, seed))
        for name in ("diffusion-tiny", "diffusion-tiny-few-steps")
    )
    tried: dict[str, tuple[LatentGenerationPipeline, dict[str, Any]]] = {
        sampler: (flow, {"sampler": sampler}) for sampler in get_args(SamplerName) if sampler != "ddim"
    }
    tried["ddim, η = 1"] = flow, {"sampler": "ddim", "eta": 1.0}
    tried[MEAN_FLOW] = mean_flow, {}
    rows = dict[str, dict[int, dict[str, float]]]()
    for name, (pipeline, options) in tried.items():
        pipeline.set_progress_bar_config(disable=True)
        rows[name] = {}
        for allowed in evaluations[: len(EVALUATIONS) - 2] if name == MEAN_FLOW else evaluations:
            given = options | {"num_inference_steps": steps_of(name, allowed)}
            rows[name][allowed] = measured(pipeline, pictures, count, seed, **given)
            print(name, allowed, {key: round(value, 3) for key, value in rows[name][allowed].items()}, flush=True)
    head = ["", *map(str, evaluations)]

    def by_evaluations(key: str) -> str:
        return table(head, [[name, *(found.get(n, {}).get(key) for n in evaluations)] for name, found in rows.items()])

    tables = [f"Fréchet distance by evaluations:\n\n{by_evaluations('frechet')}"]
    tables += [f"Class agreement:\n\n{by_evaluations('agreement')}"]
    told, learnt = (
        f"guidance {one.guidance_scale} between the times {one.guidance_interval[0]} and {one.guidance_interval[1]}"
        for one in (flow.sampling, mean_flow.sampling)
    )
    words = f"{count:,} samples with {told}; the mean flow with {learnt}; seed {seed}."
    return Report(
        name="samplers",
        title="Samplers of the diffusion prior",
        text="\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), words, *tables]),
        figures={"seed": seed, "num_images": count, "rows": rows},
        chart=lambda path: draw(rows, path),
    )


def draw(rows: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in rows.items():
        axes.plot(list(found), [one["frechet"] for one in found.values()], marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="Fréchet distance")
    axes.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)

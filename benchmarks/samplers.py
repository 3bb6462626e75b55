"""Fréchet distance of samples by the number of network evaluations, for every sampler and for a mean flow.

The prior is `diffusion-tiny` on the latents of `kl-f8` for the embedded images. Each sampler uses the recipe's guidance and as
many steps as the number of evaluations allows. (DDIM with η = 0 equals Euler.) A guided evaluation is a batch with twice the
images and counts once. Heun needs two evaluations for each step except the last, so it uses one evaluation fewer when the number
is even. The mean flow is `diffusion-tiny-few-steps`: it is trained for about as long and sampled as in its recipe, without a
doubled batch. Images and noise are the same for all. The Fréchet distance uses the features of the reference classifier and is
measured from the test images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from frame import Report, markdown_table
from quickstart_codes import train_codes, train_prior
from tokenizer_quality import BenchmarkImages, load_benchmark_images

from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.linear_probe import class_agreement
from pipelines.evaluation.pipeline_metrics import balanced_labels
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from stage2_prior.diffusion.sampling import SamplerName

EVALUATIONS = (1, 2, 4, 8, 16, 25, 50, 250)
MEAN_FLOW = "mean flow"


def select_steps(sampler: str, evaluations: int) -> int:
    """Return the number of steps that fit into the evaluations, at least one."""
    return (evaluations + 1) // 2 if sampler == "heun" else evaluations


def measure_samples(
    pipeline: LatentGenerationPipeline, images: BenchmarkImages, count: int, seed: int, **options: Any
) -> dict[str, float]:
    """Sample `count` images with `options`, and compute their metrics."""
    labels = balanced_labels(pipeline, count)
    pixels = pipeline.sample_pixels(labels, torch.Generator().manual_seed(seed), batch_size=250, **options)
    features = images.extractor.extract(to_uint8(pixels))
    return {
        "frechet": frechet_distance(features.features, images.real),
        "agreement": class_agreement(features.class_logits, labels),
    }


def run(quick: bool) -> Report:
    share, count, seed = (0.02, 100, 0) if quick else (1.0, 500, 0)
    evaluations = EVALUATIONS[:3] if quick else EVALUATIONS
    codes, images = train_codes(share, seed, "kl-f8"), load_benchmark_images("embedded")
    flow, mean_flow = (
        LatentGenerationPipeline.from_pretrained(train_prior(codes, name, share, seed))
        for name in ("diffusion-tiny", "diffusion-tiny-few-steps")
    )
    settings: dict[str, tuple[LatentGenerationPipeline, dict[str, Any]]] = {
        sampler: (flow, {"sampler": sampler}) for sampler in get_args(SamplerName) if sampler != "ddim"
    }
    settings["ddim, η = 1"] = flow, {"sampler": "ddim", "eta": 1.0}
    settings[MEAN_FLOW] = mean_flow, {}
    rows = dict[str, dict[int, dict[str, float]]]()
    for name, (pipeline, options) in settings.items():
        pipeline.set_progress_bar_config(disable=True)
        rows[name] = {}
        for max_evaluations in evaluations[: len(EVALUATIONS) - 2] if name == MEAN_FLOW else evaluations:
            step_options = options | {"num_inference_steps": select_steps(name, max_evaluations)}
            rows[name][max_evaluations] = measure_samples(pipeline, images, count, seed, **step_options)
            print(
                name,
                max_evaluations,
                {key: round(value, 3) for key, value in rows[name][max_evaluations].items()},
                flush=True,
            )
    head = ["", *map(str, evaluations)]

    def by_evaluations(key: str) -> str:
        return markdown_table(
            head, [[name, *(metrics.get(n, {}).get(key) for n in evaluations)] for name, metrics in rows.items()]
        )

    tables = [f"Fréchet distance by evaluations:\n\n{by_evaluations('frechet')}"]
    tables += [f"Class agreement:\n\n{by_evaluations('agreement')}"]
    guidance, mean_flow_guidance = (
        f"guidance {options.guidance_scale} between the times {options.guidance_interval[0]} and {options.guidance_interval[1]}"
        for options in (flow.sampling, mean_flow.sampling)
    )
    setting = f"{count:,} samples with {guidance}; the mean flow with {mean_flow_guidance}; seed {seed}."
    return Report(
        name="samplers",
        title="Samplers of the diffusion prior",
        text="\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), setting, *tables]),
        results={"seed": seed, "num_images": count, "rows": rows},
        chart=lambda path: plot_chart(rows, path),
    )


def plot_chart(rows: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, metrics in rows.items():
        axes.plot(
            list(metrics), [values["frechet"] for values in metrics.values()], marker="o", markersize=3, label=name
        )
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="Fréchet distance")
    axes.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)

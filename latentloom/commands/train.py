"""latentloom train: the main job on one's own images, in one command."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from latentloom.checks import check_apart, check_count, check_dry_run, check_minutes
from latentloom.commands.arguments import parse, recipe_help, training_values
from latentloom.jobs.main_job import check_stages_fit, format_summary, run_main_job
from latentloom.jobs.stages import load_source, print_classes
from latentloom.planning.dry_run import dry_run, format_total_time
from latentloom.planning.memory_estimate import measure_step_seconds
from latentloom.planning.recipe_selection import PRIOR_EPOCHS, TOKENIZER_EPOCHS, select_max_steps, select_recipes
from latentloom.planning.step_timing import time_prior_step, time_tokenizer_step
from latentloom.planning.tokenizer_inputs import TokenizerInputs, tokenizer_inputs
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.registry import new_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining, parse_size
from stage2_prior.training_config import PriorTraining, parse_prior_training
from training_harness.configuration import from_mapping
from training_harness.processes import accelerated_device, print_once
from training_harness.trackers import TrackerName


@dataclass(frozen=True, kw_only=True)
class Arguments:
    data: str
    """Folder of images or of class folders, Parquet, saved data set, Hub name, or fashion-mnist-mini."""
    output: Path
    """Folder for everything: tokenizer, codes, prior, pipeline, pictures and figures."""
    recipe: Annotated[str | None, recipe_help("The prior's recipe", "prior")] = None
    tokenizer_recipe: Annotated[str | None, recipe_help("The tokenizer's recipe", "tokenizer")] = None
    resolution: int | str | None = None
    """Height and width of the images: 64, or 64x96; by default the commonest size in the data, at most 256."""
    image_channels: int | None = None
    """1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; by default what the data needs."""
    minutes: float | None = None
    """Bounds the whole time: sets both stages' steps once, at the start, to what fits on this machine."""
    max_steps: int | None = None
    """Steps of each stage, in place of those chosen."""
    batch_size: int | None = None
    accumulation_steps: int | None = None
    """Batches whose gradients one step adds up: less memory than a batch as large."""
    checkpoint_every: int | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """bf16 on GPUs that have it halves the memory of activations and quickens most steps."""
    compile: bool = False
    """Compiles the networks with torch.compile: some minutes once, then quicker steps on most GPUs."""
    gradient_checkpointing: bool = False
    """Computes each block's activations again in the backward pass: much less memory, about a third more time."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that get figures and samples too; needs `pip install "latentloom[track]"`."""
    seed: int = 0
    num_images: int = 2000
    """Samples that the figures are measured on."""
    dry_run: bool = False
    """Says what both stages would take, and writes nothing."""

    def __post_init__(self) -> None:
        check_minutes(self.minutes)
        check_count("--num-images", self.num_images)
        check_dry_run(self.dry_run, self.minutes)
        check_apart(self.output, self.data)


def main(words: list[str]) -> None:
    a = parse(Arguments, "train", words)
    source = load_source(a.data)
    seen, images = dataset_statistics(source.train), len(source.train)
    size = None if a.resolution is None else parse_size(a.resolution)
    device = accelerated_device().type
    choice = select_recipes(seen, images, device, size=size, tokenizer=a.tokenizer_recipe, prior=a.recipe)
    given = {
        name: value
        for name in (
            *("max_steps", "batch_size", "accumulation_steps", "checkpoint_every", "seed"),
            *("mixed_precision", "compile", "gradient_checkpointing", "report_to"),
        )
        if (value := getattr(a, name)) is not None
    }
    of_images = {
        "data": a.data,
        "output": str(a.output / "tokenizer"),
        "resolution": f"{choice.size[0]}x{choice.size[1]}",
        "image_channels": a.image_channels,
    }
    values = training_values("tokenizer", choice.tokenizer, None, given | of_images)
    tokenizer = from_mapping(TokenizerTraining, values)
    of_codes = {"codes": str(a.output / "codes"), "output": str(a.output / "prior")}
    prior = parse_prior_training(training_values("prior", choice.prior, None, given | of_codes))
    check_stages_fit(tokenizer, prior)
    if a.max_steps is None:
        steps = select_max_steps(images, tokenizer.batch_size, TOKENIZER_EPOCHS, tokenizer.max_steps)
        tokenizer = replace(tokenizer, max_steps=steps)
        prior = replace(prior, max_steps=select_max_steps(images, prior.batch_size, PRIOR_EPOCHS, prior.max_steps))
    inputs = tokenizer_inputs(tokenizer, source, seen)
    for line in choice.reasons:
        print_once(line)
    print_classes(source)
    if a.dry_run:
        print_once(shared_values(inputs, choice.tokenizer, prior, choice.prior))
        return
    if a.minutes is None and not a.output.exists():
        announce(inputs, prior)
    metrics = run_main_job(a.output, inputs, prior, minutes=a.minutes, num_images=a.num_images)
    print_once(format_summary(a.output, metrics))


def shared_values(inputs: TokenizerInputs, tokenizer_recipe: str, prior: PriorTraining, prior_recipe: str) -> str:
    """What --dry-run prints."""
    images, classes = len(inputs.source.train), len(inputs.source.label_names or ())
    spec = new_tokenizer(inputs.model).latent_spec()
    stages = list[tuple[str, float]]()
    if inputs.config.model.is_trainable:
        title = f"tokenizer {tokenizer_recipe}"
        stages.append(dry_run(title, inputs.config, images, lambda c: time_tokenizer_step(c, inputs.model)))
    stages.append(dry_run(f"prior {prior_recipe}", prior, images, lambda c: time_prior_step(c, spec, classes)))
    texts, seconds = zip(*stages, strict=True)
    return "\n".join([*texts, format_total_time(seconds)])


def announce(inputs: TokenizerInputs, prior: PriorTraining) -> None:
    """Prints how long the training will take, from a few measured steps of each stage."""
    tokenizer, classes = inputs.config, len(inputs.source.label_names or ())
    spec = new_tokenizer(inputs.model).latent_spec()
    minutes = dict[str, float]()
    if tokenizer.model.is_trainable:
        seconds = measure_step_seconds(tokenizer, lambda config: time_tokenizer_step(config, inputs.model))
        minutes[f"{tokenizer.max_steps} steps of the tokenizer"] = tokenizer.max_steps * seconds / 60
    seconds = measure_step_seconds(prior, lambda config: time_prior_step(config, spec, classes))
    minutes[f"{prior.max_steps} steps of the prior"] = prior.max_steps * seconds / 60
    parts = ", ".join(f"{steps} ({own:.1f} min)" for steps, own in minutes.items())
    print_once(
        f"training will take about {sum(minutes.values()):.0f} minutes on this machine: {parts}; --minutes N bounds it"
    )

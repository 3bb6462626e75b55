"""latentloom train: train both stages on your images and generate samples, in one command."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from latentloom.checks import check_count, check_dry_run, check_minutes, check_output_outside_data
from latentloom.commands.arguments import describe_recipes, parse, training_values
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
    """Folder for everything that is written: tokenizer, codes, prior, pipeline, images and metrics."""
    recipe: str | None = field(
        default=None, metadata=describe_recipes("Recipe of the prior", "prior", "from the images and the device")
    )
    tokenizer_recipe: str | None = field(
        default=None, metadata=describe_recipes("Recipe of the tokenizer", "tokenizer", "from the size of the images")
    )
    resolution: int | str | None = None
    """Height and width of the images: 64, or 64x96. (default: the most common size in the data, at most 256)"""
    image_channels: int | None = None
    """Channels: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGBA. (default: from the images)"""
    minutes: float | None = None
    """Time limit: sets the steps of both stages once, at the start, to what fits on this machine. (default: no limit)"""
    max_steps: int | None = None
    """Training steps of each stage. (default: from the recipes and the number of images)"""
    batch_size: int | None = None
    """Images in a batch, for each process. (default: the recipes')"""
    accumulation_steps: int | None = None
    """Batches whose gradients are added up in one step; needs less memory than one large batch. (default: the recipes')"""
    checkpoint_every: int | None = None
    """Steps between two checkpoints. (default: the recipes')"""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """`bf16` halves the memory of activations and makes most steps faster, on GPUs that support it. (default: the recipes')"""
    compile: bool = False
    """Compile the networks with torch.compile: takes minutes once, then steps are faster on most GPUs."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: much less memory, about a third more time."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that also receive metrics and samples; needs `pip install "latentloom[track]"`."""
    seed: int = 0
    """Random seed."""
    num_images: int = 2000
    """Samples to compute the metrics on."""
    dry_run: bool = False
    """Print the time and the memory that both stages would take, and write nothing."""

    def __post_init__(self) -> None:
        check_minutes(self.minutes)
        check_count("--num-images", self.num_images)
        check_dry_run(self.dry_run, self.minutes)
        check_output_outside_data(self.output, self.data)


GROUPS = {
    "data": ("data", "resolution", "image_channels"),
    "model": ("recipe", "tokenizer_recipe"),
    "training": (
        *("max_steps", "minutes", "batch_size", "accumulation_steps", "mixed_precision", "compile"),
        *("gradient_checkpointing", "seed", "dry_run"),
    ),
    "output": ("output", "checkpoint_every", "report_to", "num_images"),
}


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "train", argv, GROUPS)
    source = load_source(arguments.data)
    statistics, num_images = dataset_statistics(source.train), len(source.train)
    size = None if arguments.resolution is None else parse_size(arguments.resolution)
    device = accelerated_device().type
    selection = select_recipes(
        statistics, num_images, device, size=size, tokenizer=arguments.tokenizer_recipe, prior=arguments.recipe
    )
    shared = {
        name: value
        for name in (
            *("max_steps", "batch_size", "accumulation_steps", "checkpoint_every", "seed"),
            *("mixed_precision", "compile", "gradient_checkpointing", "report_to"),
        )
        if (value := getattr(arguments, name)) is not None
    }
    tokenizer_values = {
        "data": arguments.data,
        "output": str(arguments.output / "tokenizer"),
        "resolution": f"{selection.size[0]}x{selection.size[1]}",
        "image_channels": arguments.image_channels,
    }
    values = training_values("tokenizer", selection.tokenizer, None, shared | tokenizer_values)
    tokenizer = from_mapping(TokenizerTraining, values)
    prior_values = {"codes": str(arguments.output / "codes"), "output": str(arguments.output / "prior")}
    prior = parse_prior_training(training_values("prior", selection.prior, None, shared | prior_values))
    check_stages_fit(tokenizer, prior)
    if arguments.max_steps is None:
        steps = select_max_steps(num_images, tokenizer.batch_size, TOKENIZER_EPOCHS, tokenizer.max_steps)
        tokenizer = replace(tokenizer, max_steps=steps)
        prior = replace(prior, max_steps=select_max_steps(num_images, prior.batch_size, PRIOR_EPOCHS, prior.max_steps))
    inputs = tokenizer_inputs(tokenizer, source, statistics)
    for line in selection.reasons:
        print_once(line)
    print_classes(source)
    if arguments.dry_run:
        print_once(format_dry_run(inputs, selection.tokenizer, prior, selection.prior))
        return
    if arguments.minutes is None and not arguments.output.exists():
        print_time_estimate(inputs, prior)
    metrics = run_main_job(arguments.output, inputs, prior, minutes=arguments.minutes, num_images=arguments.num_images)
    print_once(format_summary(arguments.output, metrics))


def format_dry_run(inputs: TokenizerInputs, tokenizer_recipe: str, prior: PriorTraining, prior_recipe: str) -> str:
    """Format what --dry-run prints."""
    num_images, num_classes = len(inputs.source.train), len(inputs.source.label_names or ())
    spec = new_tokenizer(inputs.model).latent_spec()
    stages = list[tuple[str, float]]()
    if inputs.config.model.is_trainable:
        title = f"tokenizer {tokenizer_recipe}"
        stages.append(dry_run(title, inputs.config, num_images, lambda c: time_tokenizer_step(c, inputs.model)))
    stages.append(dry_run(f"prior {prior_recipe}", prior, num_images, lambda c: time_prior_step(c, spec, num_classes)))
    texts, seconds = zip(*stages, strict=True)
    return "\n".join([*texts, format_total_time(seconds)])


def print_time_estimate(inputs: TokenizerInputs, prior: PriorTraining) -> None:
    """Print how long training will take, from a few measured steps of each stage."""
    tokenizer, num_classes = inputs.config, len(inputs.source.label_names or ())
    spec = new_tokenizer(inputs.model).latent_spec()
    minutes = dict[str, float]()
    if tokenizer.model.is_trainable:
        seconds = measure_step_seconds(tokenizer, lambda config: time_tokenizer_step(config, inputs.model))
        minutes[f"{tokenizer.max_steps} steps of the tokenizer"] = tokenizer.max_steps * seconds / 60
    seconds = measure_step_seconds(prior, lambda config: time_prior_step(config, spec, num_classes))
    minutes[f"{prior.max_steps} steps of the prior"] = prior.max_steps * seconds / 60
    parts = ", ".join(f"{steps} ({duration:.1f} min)" for steps, duration in minutes.items())
    print_once(
        f"training will take about {sum(minutes.values()):.0f} minutes on this machine: {parts}; --minutes N limits it"
    )

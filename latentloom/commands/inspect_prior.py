"""latentloom inspect-prior: write an HTML report on a prior: per-position likelihood and nearest training images."""

from dataclasses import dataclass
from pathlib import Path

from latentloom.checks import check_count, check_html_output, check_seed
from latentloom.commands.arguments import parse
from latentloom.inspection.prior_measure import inspect_prior
from latentloom.inspection.prior_page import prior_page
from latentloom.jobs.evaluation import select_at_most
from latentloom.jobs.stages import load_source
from latentloom.report.numbers import format_count, format_number, format_percent
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import ImageSplit
from training_harness.files import write_text
from training_harness.processes import accelerated_device, is_main_process, main_process_first, print_once


@dataclass(frozen=True, kw_only=True)
class Arguments:
    pipeline: str
    """Run folder, pipeline folder or Hub repository."""
    data: str
    """Images that the pipeline was trained on. The test split is held out if there is one, else the validation split."""
    num_images: int = 1000
    """Held-out images to use, at most."""
    num_samples: int = 200
    """Samples to compare with the training images, the same number of each class."""
    max_training_images: int = 50_000
    """Training images to compare with, at most."""
    output: Path = Path("prior.html")
    """HTML file to write."""
    seed: int = 0
    """Random seed for the samples and the choice of images."""

    def __post_init__(self) -> None:
        for option, value in (
            ("--num-images", self.num_images),
            ("--num-samples", self.num_samples),
            ("--max-training-images", self.max_training_images),
        ):
            check_count(option, value)
        check_seed(self.seed)
        check_html_output(self.output, "prior.html")


GROUPS = {
    "data": ("pipeline", "data", "num_images", "num_samples", "max_training_images", "seed"),
    "output": ("output",),
}


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "inspect-prior", argv, GROUPS)
    with main_process_first():
        if is_main_process():
            write_page(arguments)


def write_page(arguments: Arguments) -> None:
    pipeline = LatentGenerationPipeline.from_pretrained(arguments.pipeline).to(accelerated_device())
    source = load_source(arguments.data).with_label_names(pipeline.label_names)

    def load_images(split: ImageSplit, limit: int) -> ImageLoader:
        images = ImageLoader(select_at_most(split, limit, arguments.seed), pipeline.tokenizer.config.image_processor)
        images.report_skipped()
        return images

    held_out, train = (
        load_images(source.held_out, arguments.num_images),
        load_images(source.train, arguments.max_training_images),
    )
    inspection = inspect_prior(pipeline, held_out, train, arguments.num_samples, arguments.seed)
    write_text(arguments.output, prior_page(pipeline, inspection, arguments.pipeline, arguments.data))
    shared_codes = format_percent(float(inspection.neighbours.samples.median()))
    print_once(
        f"{format_count(len(inspection.bits), 'image')}, {format_number(inspection.bits.mean().item())} bits a code, "
        f"{shared_codes} of a sample's codes shared with the nearest training image: {arguments.output}"
    )

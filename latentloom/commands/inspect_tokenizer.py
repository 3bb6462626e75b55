"""latentloom inspect-tokenizer: write an HTML report on a tokenizer: errors, codes and where they are used."""

from dataclasses import dataclass
from pathlib import Path

from latentloom.checks import check_count, check_html_output, check_seed
from latentloom.commands.arguments import parse
from latentloom.inspection.measure import inspect_tokenizer
from latentloom.inspection.page import InspectedTokenizer, summarize, tokenizer_page
from latentloom.jobs.evaluation import select_at_most
from latentloom.jobs.stages import load_source, load_tokenizer
from stage1_tokenizer.data.image_loader import ImageLoader
from training_harness.files import write_text
from training_harness.processes import accelerated_device, is_main_process, main_process_first, print_once


@dataclass(frozen=True, kw_only=True)
class Arguments:
    tokenizer: str
    """Run folder, model folder, pipeline folder or Hub repository."""
    data: str
    """Images. The test split is used if there is one, else the validation split."""
    num_images: int = 1000
    """Images to use, at most; they are chosen at random."""
    output: Path = Path("inspection.html")
    """HTML file to write."""
    seed: int = 0
    """Random seed for the choice of images."""

    def __post_init__(self) -> None:
        check_count("--num-images", self.num_images)
        check_seed(self.seed)
        check_html_output(self.output, "inspection.html")


GROUPS = {"data": ("tokenizer", "data", "num_images", "seed"), "output": ("output",)}


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "inspect-tokenizer", argv, GROUPS)
    with main_process_first():
        if is_main_process():
            write_page(arguments)


def write_page(arguments: Arguments) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer)[0].to(accelerated_device())
    source = load_source(arguments.data)
    split = source.held_out
    images = ImageLoader(select_at_most(split, arguments.num_images, arguments.seed), tokenizer.config.image_processor)
    images.report_skipped()
    inspection = inspect_tokenizer(tokenizer, images, arguments.seed)
    subject = InspectedTokenizer(
        tokenizer=tokenizer,
        name=arguments.tokenizer,
        data=arguments.data,
        split="validation" if source.test is None else "test",
        num_available=len(split),
        seed=arguments.seed,
    )
    write_text(arguments.output, tokenizer_page(subject, inspection))
    print_once(f"{summarize(tokenizer, inspection)}: {arguments.output}")

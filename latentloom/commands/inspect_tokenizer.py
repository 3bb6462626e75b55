"""latentloom inspect-tokenizer: one HTML page of a tokenizer's errors, codes and where it uses them."""

from dataclasses import dataclass
from pathlib import Path

from latentloom.checks import check_count, check_page, check_seed
from latentloom.commands.arguments import parse
from latentloom.inspection.measure import inspect
from latentloom.inspection.page import Subject, page, summary
from latentloom.jobs.stages import load_source, load_tokenizer
from pipelines.evaluation.feature_files import random_positions
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
        check_page(self.output, "inspection.html")


GROUPS = {"data": ("tokenizer", "data", "num_images", "seed"), "output": ("output",)}


def main(words: list[str]) -> None:
    a = parse(Arguments, "inspect-tokenizer", words, GROUPS)
    with main_process_first():
        if is_main_process():
            draw(a)


def draw(a: Arguments) -> None:
    tokenizer = load_tokenizer(a.tokenizer)[0].to(accelerated_device())
    source = load_source(a.data)
    split = source.held_out
    drawn = random_positions(len(split), a.num_images, a.seed).tolist()
    pixels = ImageLoader(split.select(drawn), tokenizer.config.image_processor)
    pixels.report_skipped()
    found = inspect(tokenizer, pixels, a.seed)
    subject = Subject(
        tokenizer=tokenizer,
        name=a.tokenizer,
        data=a.data,
        split="validation" if source.test is None else "test",
        available=len(split),
        seed=a.seed,
    )
    write_text(a.output, page(subject, found))
    print_once(f"{summary(tokenizer, found)}: {a.output}")

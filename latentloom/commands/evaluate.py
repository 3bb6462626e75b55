"""latentloom evaluate: figures of a pipeline, or of a tokenizer, on held-out images."""

import json
from dataclasses import dataclass
from pathlib import Path

from latentloom.arguments import check_count, check_seed, parse
from latentloom.main_job import extractor_for
from latentloom.stages import load_source, load_tokenizer, say
from pipelines.evaluation import balanced_samples, evaluate_reconstructions, evaluate_samples, reconstructions
from pipelines.latent_generation import LatentGenerationPipeline, accelerated_device
from stage1_tokenizer.pixels import Pixels
from training_harness.errors import UserError
from training_harness.files import write_json


@dataclass(frozen=True, kw_only=True)
class Arguments:
    reference: str
    """Images to compare with: their test split where they have one, else the validation split."""
    pipeline: str | None = None
    """Run folder, pipeline folder or Hub repository; or give --tokenizer."""
    tokenizer: str | None = None
    """Run folder, model folder or Hub repository: reconstruction alone."""
    num_images: int = 2000
    """Samples drawn, as many of each class."""
    seed: int = 0
    output: Path | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        if (self.pipeline is None) == (self.tokenizer is None):
            raise UserError("expected one of --pipeline and --tokenizer; give what is to be measured")
        if self.output is not None and self.output.is_dir():
            raise UserError(
                f"--output is {self.output}, a folder; expected a JSON file, such as {self.output / 'figures.json'}"
            )
        check_count("--num-images", self.num_images)
        check_seed(self.seed)


def main(words: list[str]) -> None:
    a = parse(Arguments, "evaluate", words)
    source = load_source(a.reference)
    extractor = extractor_for(a.reference)
    if a.pipeline is not None:
        pipeline = LatentGenerationPipeline.from_pretrained(a.pipeline).to(accelerated_device())
        tokenizer = pipeline.tokenizer
        if pipeline.label_names != source.label_names:  # its ids mean other classes than the judge's
            extractor = extractor._replace(logits=None)
    else:
        tokenizer = load_tokenizer(a.tokenizer or "")[0].to(accelerated_device())
    held_out = Pixels(source.held_out, tokenizer.config.image_processor)
    held_out.report_skipped()
    originals, rebuilt, code_counts = reconstructions(tokenizer, held_out)
    figures = evaluate_reconstructions(originals, rebuilt, code_counts, extractor)
    if a.pipeline is not None:
        images, labels = balanced_samples(pipeline, a.num_images, a.seed)
        figures |= evaluate_samples(images, labels, originals, extractor)
        figures |= {"num_images": len(images), "sampling": vars(pipeline.sampling)}
    figures |= {
        "num_reference_images": len(held_out),
        "reference": source.name,
        "features": extractor.name,
        "seed": a.seed,
    }
    if a.output is not None:
        write_json(a.output, figures)
    say(json.dumps(figures, indent=2))

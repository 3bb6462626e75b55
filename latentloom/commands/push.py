"""latentloom push: upload a pipeline to the Hugging Face Hub, with its model card, sample grid and metrics."""

import json
from dataclasses import dataclass

from PIL import Image

from latentloom.commands.arguments import parse
from pipelines.hub import local_folder
from pipelines.latent_generation import LatentGenerationPipeline
from pipelines.saving import INDEX
from training_harness.errors import UserError
from training_harness.processes import is_main_process, main_process_first, print_once


@dataclass(frozen=True, kw_only=True)
class Arguments:
    pipeline: str
    """Run folder or pipeline folder."""
    repo_id: str
    """Repository such as me/my-generator; it is created if it does not exist."""
    private: bool = False
    """Create a private repository."""
    commit_message: str = "Upload latentloom pipeline"
    """Message of the commit."""


GROUPS = {"repository": ("pipeline", "repo_id", "private", "commit_message")}


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "push", argv, GROUPS)
    with main_process_first():
        if is_main_process():
            push(arguments)


def push(arguments: Arguments) -> None:
    folder = local_folder(arguments.pipeline, INDEX, "pipeline")
    metrics_path, samples_path = folder / "metrics.json", folder / "samples.png"
    try:
        metrics = json.loads(metrics_path.read_text(encoding="utf-8")) if metrics_path.exists() else None
        samples = Image.open(samples_path) if samples_path.exists() else None
    except (ValueError, OSError) as error:  # no JSON, or no image
        raise UserError(
            f"metrics.json or samples.png in {folder} cannot be read ({error}); expected the files that a training run writes; "
            "repair or remove it"
        ) from None
    address = LatentGenerationPipeline.from_pretrained(folder).push_to_hub(
        arguments.repo_id,
        private=arguments.private or None,
        commit_message=arguments.commit_message,
        metrics=metrics,
        samples=samples,
    )
    print_once(f"pushed: {address}")

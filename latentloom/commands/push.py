"""latentloom push: a pipeline to the Hugging Face Hub, with its card, sample grid and figures."""

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


def main(words: list[str]) -> None:
    a = parse(Arguments, "push", words, GROUPS)
    with main_process_first():
        if is_main_process():
            push(a)


def push(a: Arguments) -> None:
    folder = local_folder(a.pipeline, INDEX, "pipeline")
    metrics, samples = folder / "metrics.json", folder / "samples.png"
    try:
        figures = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else None
        shown = Image.open(samples) if samples.exists() else None
    except (ValueError, OSError) as error:  # no JSON, or no picture
        raise UserError(
            f"metrics.json or samples.png in {folder} cannot be read ({error}); expected those of evaluation; mend or remove it"
        ) from None
    address = LatentGenerationPipeline.from_pretrained(folder).push_to_hub(
        a.repo_id, private=a.private or None, commit_message=a.commit_message, metrics=figures, samples=shown
    )
    print_once(f"pushed: {address}")

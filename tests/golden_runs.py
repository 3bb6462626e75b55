"""The first training steps of each recipe on fixed data. `make golden` writes their losses to `tests/golden`."""

import json
from pathlib import Path

import torch
from small_parts import write_images
from tiny_models import tiny_source, tiny_tokenizer

from latentloom.commands.arguments import training_values
from latentloom.jobs.stages import run_prior, run_tokenizer
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from latentloom.recipes import recipe_names, recipe_values
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import parse_prior_training
from training_harness.configuration import from_mapping
from training_harness.run import Run

# Recipes without training, and recipes that are too large for a test.
EXCLUDED = ("identity", "ar-llamagen", "diffusion-dit")
RECIPES = [
    (stage, name) for stage in ("tokenizer", "prior") for name in recipe_names(stage) if not name.startswith(EXCLUDED)
]
STEPS_OF_LARGE_RECIPES = {"ar-small": 6, "kl-f16": 4, "vqgan-f16": 4}  # these need seconds per step on one core
GOLDEN_FOLDER = Path(__file__).parent / "golden"


def step_count(recipe: str) -> int:
    """Return the number of steps of a recipe's golden losses."""
    return STEPS_OF_LARGE_RECIPES.get(recipe, 10)


class EnoughSteps(Exception):  # noqa: N818 - ends a run; not an error
    pass


def compute_losses(stage: str, recipe: str, folder: Path, stop_after: int | None = None) -> list[dict[str, float]]:
    """Train the first steps of a recipe, all or `stop_after`; return the loss terms of each step by name."""
    steps = step_count(recipe)
    size = min(
        64, 4 * 2 ** (len(recipe_values(recipe, stage)["model"].get("channels", [1, 1])) - 1)
    )  # 4×4 codes or fewer
    fields = {"output": str(folder / "run"), "max_steps": steps, "batch_size": 4, "log_every": 1, "seed": 0}
    fields |= {"sample_every": steps, "checkpoint_every": steps, "matmul_precision": "highest"}
    step_losses: list[dict[str, float]] = []
    original_log, threads = Run.log, torch.get_num_threads()

    def record(run: Run, step: int, values: dict[str, torch.Tensor]) -> None:
        step_losses.append(
            {name: torch.as_tensor(value).item() for name, value in values.items() if name != "learning_rate"}
        )
        if step == stop_after:
            raise EnoughSteps
        original_log(run, step, values)

    torch.set_num_threads(1)
    Run.log = record  # type: ignore[method-assign, assignment]
    try:
        if stage == "tokenizer":
            data = write_images(folder / "images", size=(size, size))
            values = training_values(stage, recipe, None, fields | {"data": str(data)})
            run_tokenizer(tokenizer_inputs(from_mapping(TokenizerTraining, values), open_source(data)))
        else:
            tiny_tokenizer().save_pretrained(folder / "tokenizer")
            values = training_values(stage, recipe, None, fields | {"codes": str(folder / "codes")})
            write_code_cache(
                tiny_tokenizer(),
                folder / "tokenizer",
                tiny_source(),
                folder / "codes",
                contents="both",
                degradation=values.get("degradation", "none"),
            )
            run_prior(parse_prior_training(values))
    except EnoughSteps:
        pass
    finally:
        Run.log = original_log  # type: ignore[method-assign]
        torch.set_num_threads(threads)
    return step_losses


def format_losses(losses: list[dict[str, float]]) -> str:
    """Format losses as JSON lines with six significant digits."""
    return "".join(json.dumps({name: float(f"{value:.6g}") for name, value in step.items()}) + "\n" for step in losses)


def stored_losses(recipe: str) -> list[dict[str, float]]:
    """Read the golden losses of a recipe."""
    return [json.loads(line) for line in (GOLDEN_FOLDER / f"{recipe}.txt").read_text().splitlines()]

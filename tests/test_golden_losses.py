"""The first losses of every recipe are those that are kept; `make golden` keeps others, with a reason in the commit."""

from pathlib import Path
from statistics import fmean

import pytest
from golden_runs import GOLDEN_FOLDER, RECIPES, compute_losses, step_count, stored_losses

# Machines and versions of torch sum in other orders: 1e-7 at the first step, which training makes larger with each further one.
# In a tokenizer a vector between two codes then takes the other one, which moves its losses by percents: means are compared.
EARLY, LATE = 1e-4, {"tokenizer": 0.1, "prior": 1e-3}
EXACT_STEPS = {"tokenizer": 2, "prior": 5}


@pytest.mark.parametrize(("stage", "recipe"), RECIPES, ids=[name for _, name in RECIPES])
def test_the_first_steps_have_the_losses_that_are_kept(stage: str, recipe: str, tmp_path: Path) -> None:
    expected, found = stored_losses(recipe), compute_losses(stage, recipe, tmp_path)
    assert len(found) == len(expected) == step_count(recipe)
    exact = EXACT_STEPS[stage]
    for step, (one, other) in enumerate(zip(found[:exact], expected[:exact], strict=True), 1):
        assert one == pytest.approx(other, rel=EARLY, abs=1e-6), f"step {step}"
    means = [{term: fmean(step[term] for step in losses[exact:]) for term in losses[0]} for losses in (found, expected)]
    assert means[0] == pytest.approx(means[1], rel=LATE[stage]), f"means of steps {exact + 1} to {len(found)}"
    first = next(iter(expected[0]))
    assert expected[0][first] != pytest.approx(expected[1][first], rel=EARLY), "a step would not be missed"


def test_every_recipe_has_its_losses_and_no_other_has() -> None:
    assert {path.stem for path in GOLDEN_FOLDER.glob("*.txt")} == {name for _, name in RECIPES}

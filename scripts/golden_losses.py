"""Write tests/golden: the losses of the first steps of every recipe. The tests compare with these files.

    python scripts/golden_losses.py        # or: make golden. Explain in the commit why the losses changed

Setting: float32, one thread, one seed, batches of 4; small images of discs for tokenizers, random codes for priors.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from golden_runs import GOLDEN_FOLDER, RECIPES, compute_losses, format_losses  # noqa: E402

GOLDEN_FOLDER.mkdir(exist_ok=True)
for stage, name in RECIPES:
    with TemporaryDirectory() as folder:
        (GOLDEN_FOLDER / f"{name}.txt").write_text(format_losses(compute_losses(stage, name, Path(folder))))
    print(name)

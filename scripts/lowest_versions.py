"""Print the lowest versions that pyproject.toml allows (dependencies, trackers, search) as pip constraints."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["track"], *extras["sweep"]]:
    if match := re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement):
        print(f"{match[1]}=={match[2]}")

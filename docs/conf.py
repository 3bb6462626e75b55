"""Sphinx's configuration: `make docs` builds docs/_build/html, without a network, and warnings are errors."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from latentloom import __version__  # noqa: E402

project = "latentloom"
author = "The latentloom authors"
project_copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",
    "reference_pages",
]
exclude_patterns = ["_build", "_ext", "LOG.md", "reference/_generated"]

myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 4

default_role = "code"
autodoc_inherit_docstrings = False  # torch's and transformers' own words would stand in for ours
autodoc_member_order = "bysource"
autodoc_use_type_comments = False
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries = False
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style")]

html_theme = "furo"
html_title = f"latentloom {release}"
html_show_sphinx = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"

# Several classes have a field of one name, such as `tokenizer`: a word in a docstring may then link to any of them.
suppress_warnings = ["ref.python"]

"""The options of every verb, as `latentloom VERB --help` shows them.

The reference pages and the tests both use this module, so that a page names only options that exist.
"""

import contextlib
import io
import os
from unittest import mock

from latentloom.cli import main
from latentloom.commands.option_help import HelpPage, OptionGroup


def help_text(verb: str, *words: str) -> str:
    """Return what `latentloom VERB --help` prints, 100 columns wide."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([verb, *words, "--help"])
    return printed.getvalue()


def option_groups(verb: str, *words: str) -> list[OptionGroup]:
    """Return the groups of a verb's options; `words` such as `--recipe NAME` choose the configuration."""
    pages: list[HelpPage] = []

    def keep_page(page: HelpPage, width: int) -> str:
        pages.append(page)
        return ""

    with mock.patch("latentloom.commands.arguments.format_help", keep_page):
        help_text(verb, *words)
    return pages[0].groups


def option_names(verb: str, *words: str) -> set[str]:
    """Return the names of a verb's options, with their hyphens."""
    return {name for group in option_groups(verb, *words) for option in group.options for name in option.names}

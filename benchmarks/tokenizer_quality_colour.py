"""`tokenizer_quality` on colour images: emoji and crops of photographs of 32×32 pixels."""

from frame import Report
from tokenizer_quality import run_set


def run(quick: bool) -> Report:
    return run_set("colour", 5.0, quick)

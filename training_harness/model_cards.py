"""Model cards that users may edit: our text stands between two markers, everything else in the file is theirs.

---                         YAML header: written once, then left as it is
---
<!-- latentloom: begin -->
…                           renewed whenever the model is saved
<!-- latentloom: end -->
"""

import re
from pathlib import Path

from training_harness.files import write_text

CARD_FILE = "README.md"
BEGIN_MARKER, END_MARKER = "<!-- latentloom: begin -->", "<!-- latentloom: end -->"
# Lines of the cards that versions without markers wrote.
EARLIER_LINES = re.compile(
    r"# (Image tokenizer|Image generator|\w+ prior)|## Figures|\|.*\||```(python)?|!\[samples\].*|A .* that turns images .*|"
    r"Samples images of .*|\(.* parameters\) turns them into pixels\.|A decoder-only .* over .*|A diffusion .* over .*|"
    r"N = .*|Classes: .*|import torch|from (latentloom|stage1_tokenizer) import .*|pipeline = .*|images(\[0\])?[ .].*|"
    r"tokenizer = .*|(indices|latents) = .*"
)


def write_card(folder: Path, beside: Path, card: str) -> None:
    """Writes a card for `folder` into `beside`, with what the user has written around ours in the card that `folder` holds.

    Args:
        card: YAML header and text.
    """
    path = folder / CARD_FILE
    existing = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    text = merge_card(existing, card).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    write_text(beside / CARD_FILE, text)


def merge_card(existing: str, card: str) -> str:
    """`card` in the place of our text in `existing`; what stands around it stays."""
    header, text = split_header(card)
    ours = f"{BEGIN_MARKER}\n{text.strip()}\n{END_MARKER}\n"
    begin, end = existing.find(BEGIN_MARKER), existing.find(END_MARKER)
    if 0 <= begin < end:
        return existing[:begin] + ours + existing[end + len(END_MARKER) :].removeprefix("\n")
    own_header, own_text = split_header(existing)
    if is_earlier_card(own_header, own_text):
        return header + "\n" + ours
    if not own_text.strip():
        return (own_header or header) + "\n" + ours
    return (own_header or header) + "\n" + own_text.strip("\n") + "\n\n" + ours


def split_header(card: str) -> tuple[str, str]:
    """The YAML header with its lines of dashes, or nothing, and the rest."""
    found = re.match(r"---\n.*?\n---\n", card, flags=re.DOTALL)
    return (found[0], card[found.end() :]) if found else ("", card)


def is_earlier_card(header: str, text: str) -> bool:
    """Whether a card without markers is one of ours to which nothing was added."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "library_name: latentloom" in header and all(EARLIER_LINES.fullmatch(line) for line in lines)

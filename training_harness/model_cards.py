"""Model cards that users may edit. The generated text is between two markers; all other text belongs to the user.

---                         YAML header: written once, never changed afterwards
---
<!-- latentloom: begin -->
…                           replaced each time the model is saved
<!-- latentloom: end -->
"""

import re
from pathlib import Path

from training_harness.files import write_text

CARD_FILE = "README.md"
BEGIN_MARKER, END_MARKER = "<!-- latentloom: begin -->", "<!-- latentloom: end -->"
# Lines of the cards that earlier versions wrote without markers.
EARLIER_LINES = re.compile(
    r"# (Image tokenizer|Image generator|\w+ prior)|## Figures|\|.*\||```(python)?|!\[samples\].*|A .* that turns images .*|"
    r"Samples images of .*|\(.* parameters\) turns them into pixels\.|A decoder-only .* over .*|A diffusion .* over .*|"
    r"N = .*|Classes: .*|import torch|from (latentloom|stage1_tokenizer) import .*|pipeline = .*|images(\[0\])?[ .].*|"
    r"tokenizer = .*|(indices|latents) = .*"
)


def write_card(folder: Path, temporary: Path, card: str) -> None:
    """Write the new card of `folder` into `temporary`; text that the user added to the present card is kept.

    Args:
        folder: Folder of the model, which may contain a card.
        temporary: Folder for the new card.
        card: YAML header and text.
    """
    path = folder / CARD_FILE
    existing = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    text = merge_card(existing, card).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    write_text(temporary / CARD_FILE, text)


def merge_card(existing: str, card: str) -> str:
    """Replace the generated text in `existing` with the text of `card`; keep all other text."""
    header, text = split_header(card)
    generated = f"{BEGIN_MARKER}\n{text.strip()}\n{END_MARKER}\n"
    begin, end = existing.find(BEGIN_MARKER), existing.find(END_MARKER)
    if 0 <= begin < end:
        return existing[:begin] + generated + existing[end + len(END_MARKER) :].removeprefix("\n")
    existing_header, existing_text = split_header(existing)
    if is_earlier_card(existing_header, existing_text):
        return header + "\n" + generated
    if not existing_text.strip():
        return (existing_header or header) + "\n" + generated
    return (existing_header or header) + "\n" + existing_text.strip("\n") + "\n\n" + generated


def split_header(card: str) -> tuple[str, str]:
    """Split a card into its YAML header, which may be empty, and its text. The header includes the lines of dashes."""
    match = re.match(r"---\n.*?\n---\n", card, flags=re.DOTALL)
    return (match[0], card[match.end() :]) if match else ("", card)


def is_earlier_card(header: str, text: str) -> bool:
    """Return whether an earlier version generated a card without markers and the user added nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "library_name: latentloom" in header and all(EARLIER_LINES.fullmatch(line) for line in lines)

"""Writes the generated parts of the reference before Sphinx reads its sources.

    reference/api/PACKAGE.FOLDER.rst        the modules of one folder
    reference/_generated/names.md           the names that the packages export
    reference/_generated/commands.md        the options of each verb
    reference/_generated/fields-*.md        the fields of each training configuration
    reference/_generated/recipes.md         every recipe with its file

A file is written only if its text has changed, so that Sphinx does not read it again.
"""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import command_help
from sphinx.application import Sphinx

from latentloom.cli import VERBS
from latentloom.commands.option_help import GENERAL, Option, OptionGroup
from latentloom.recipes import recipe_names

ROOT = Path(__file__).parents[2]
PACKAGES = ("latentloom", "pipelines", "stage2_prior", "stage1_tokenizer", "training_harness")
COMMAND_LINE_ONLY = {"commands", "inspection", "report", "search"}
"""Folders of `latentloom` that only the command line uses."""
TRAINING_VERBS = ("train-tokenizer", "train-prior")
CONFIGURATIONS = {
    "tokenizer": ("train-tokenizer",),
    "autoregressive": ("train-prior", "--recipe", "ar-tiny"),
    "diffusion": ("train-prior", "--recipe", "diffusion-tiny"),
}


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "reference"))
    return {"parallel_read_safe": True}


def write_pages(folder: Path) -> None:
    pages = {f"_generated/{name}.md": text for name, text in generate_pages()}
    pages |= {f"api/{page}.rst": format_api_page(page, files) for page, files in list_folders().items()}
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for stale in {*folder.glob("api/*.rst"), *folder.glob("_generated/*.md")} - {folder / name for name in pages}:
        stale.unlink()


def generate_pages() -> Iterator[tuple[str, str]]:
    yield "names", format_name_tables()
    yield "commands", "\n\n".join(format_commands())
    for name, words in CONFIGURATIONS.items():
        yield f"fields-{name}", "\n\n".join(format_fields("###" if name == "tokenizer" else "####", *words))
    yield "recipes", "\n\n".join(format_recipes())


# -- the API ------------------------------------------------------------------------------------------------------


def list_folders() -> dict[str, list[Path]]:
    """List the Python files of each folder, by its dotted name."""
    files: dict[str, list[Path]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__main__.py" and not COMMAND_LINE_ONLY & set(path.relative_to(ROOT).parts):
                files.setdefault(".".join(path.relative_to(ROOT).parent.parts), []).append(path)
    return files


def format_api_page(folder: str, files: list[Path]) -> str:
    lines = [format_heading(folder, "="), *read_package_docstring(files)]
    for path in files:
        if path.name != "__init__.py":
            module = f"{folder}.{path.stem}"
            options = ("members:", "undoc-members:", "show-inheritance:", "member-order: bysource")
            lines += [
                format_heading(path.name, "-"),
                f".. automodule:: {module}\n" + "".join(f"   :{o}\n" for o in options),
            ]
    return "\n".join(lines)


def read_package_docstring(files: list[Path]) -> list[str]:
    initial = next((path for path in files if path.name == "__init__.py"), None)
    text = ast.get_docstring(ast.parse(initial.read_text(encoding="utf-8"))) if initial else None
    return [text.partition("\n\n")[0].replace("`", "``") + "\n"] if text else []


def format_heading(title: str, line: str) -> str:
    return f"{title}\n{line * len(title)}\n"


def format_name_tables() -> str:
    """Format tables of the names that the packages export, with links to their descriptions."""
    parts = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        exported = dir(module) if hasattr(module, "__getattr__") else []
        rows = []
        for name in sorted(name for name in exported if not name.startswith("_")):
            value = getattr(module, name)
            target = f"{value.__module__}.{value.__qualname__}"
            rows.append(f"| {{py:obj}}`{name} <{target}>` | {summarize(name, value)} | `{value.__module__}` |")
        if rows:
            parts.append(
                "\n".join([f"## From `{package}`", "", "| Name | What it is | Defined in |", "|---|---|---|", *rows])
            )
    return "\n\n".join(parts)


def summarize(name: str, value: object) -> str:
    """Return the first sentence of a docstring, or of the module's docstring for a class without one."""
    text = (value.__doc__ or "").strip()
    if isinstance(value, type) and (not text or text.startswith(f"{name}(")):
        if name.endswith("Config"):
            return f"Configuration of `{name.removesuffix('Config')}`."
        text = sys.modules[value.__module__].__doc__ or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return escape_markdown(re.split(r"(?<=[\w)`])\.\s", paragraph)[0].rstrip(".:") + ".")


# -- the command line and the configuration ------------------------------------------------------------------------


def format_commands() -> Iterator[str]:
    for verb, summary in VERBS.items():
        yield f"(latentloom-{verb})=\n## `latentloom {verb}`\n\n{summary[0].upper()}{summary[1:]}."
        for group in command_help.option_groups(verb):
            if group is not GENERAL and not is_section(group):
                yield f"**{group.title[0].upper()}{group.title[1:]}**"
                yield "\n\n".join(format_option(option) for option in group.options)
        if verb in TRAINING_VERBS:
            yield f"Every field of the configuration is an option as well: see [](configuration.md#fields-of-{verb})."


def format_fields(level: str, *words: str) -> Iterator[str]:
    for group in command_help.option_groups(*words):
        if group is GENERAL:
            continue
        yield f"{level} `{group.title}`" if is_section(group) else f"{level} {group.title[0].upper()}{group.title[1:]}"
        if group.description:
            yield escape_markdown(group.description)
        yield "\n\n".join(format_option(option) for option in group.options)


def is_section(group: OptionGroup) -> bool:
    """Whether a group is a section of the configuration, such as `model.quantizer`."""
    return all(option.names[0].startswith(f"--{group.title}.") for option in group.options)


def format_option(option: Option) -> str:
    """Format one option as an item of a definition list."""
    title = ", ".join(f"`{name}`" for name in option.names) + (f" `{option.values}`" if option.values else "")
    default = f" (default: {option.default})" if option.default else ""
    text = re.sub(r"(?<![`\w])--\w[\w.-]*", r"`\g<0>`", option.help + default)  # otherwise Sphinx prints `--` as a dash
    return f"{title}\n: {escape_markdown(text)}"


def format_recipes() -> Iterator[str]:
    for stage, title in (("tokenizer", "Tokenizers"), ("prior", "Priors")):
        yield f"## {title}"
        for name in recipe_names(stage):
            yield f"### `{name}`\n\n```{{literalinclude}} ../../latentloom/recipes/{name}.yaml\n:language: yaml\n```"


def escape_markdown(text: str) -> str:
    """Escape the Markdown characters in plain text, outside of backticks."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else re.sub(r"([*_\[\]<>|\\{}$])", r"\\\1", part) for i, part in enumerate(parts))

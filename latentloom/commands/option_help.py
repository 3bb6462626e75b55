"""The text of `latentloom VERB --help`, from the dataclass that holds the verb's options.

A field's docstring is the help text of its option. A docstring that ends with "(default: from the images)" describes a
default that is chosen at run time; the default of any other field is its value. Each verb has a mapping from the title of a
group to the fields in it. Required options come first, and each section of a configuration is a group of its own.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

from latentloom.cli import VERBS
from training_harness.configuration import optional_section_type, variants_by_name

ONE_REQUIRED = "required, one of"
"""Title of a group of options of which exactly one is required."""
HELP_COLUMN = 30  # where help texts begin
TYPE_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
WITHOUT_PREFIX = tyro.conf.arg(name="")
"""Marks a section whose options have no prefix: `--seed` and not `--training.seed`."""


class Option(NamedTuple):
    field: str
    """Name of the field, after the name of its section, such as `model.num_heads`."""
    names: tuple[str, ...]
    """`--seed`; `--overwrite` and `--no-overwrite` for a flag; `RUN` for a positional argument."""
    values: str
    """Type or choices, such as `INT` or `{pad,refuse}`; empty for a flag."""
    help: str
    default: str | None
    """None for a required option, empty for one of several options of which one is required."""


class OptionGroup(NamedTuple):
    title: str
    description: str
    options: list[Option]


class HelpPage(NamedTuple):
    verb: str
    note: str
    """Which defaults the page shows, for a verb with recipes."""
    groups: list[OptionGroup]

    @property
    def options(self) -> list[Option]:
        return [option for group in self.groups for option in group.options]


GENERAL = OptionGroup(
    "general",
    "",
    [
        Option("help", ("-h", "--help"), "", "Show this help and exit.", ""),
        Option("debug", ("--debug",), "", "Show the traceback of an error.", ""),
    ],
)


def build_help_page(
    verb: str, cls: Any, defaults: Any, group_fields: Mapping[str, tuple[str, ...]], note: str = ""
) -> HelpPage:
    """Describe the options of a verb, in groups.

    Args:
        cls: Dataclass of the options.
        defaults: An instance of `cls` with the defaults, or None for the defaults of its fields.
        group_fields: Fields in each group, by the group's title. Sections need no entry.
        note: Which defaults the page shows.
    """
    sections = list(_collect_sections(cls, defaults))
    fields = {option.field: option for section in sections if not section.title for option in section.options}
    required = [option for section in sections for option in section.options if option.default is None]
    order = [*chain(*group_fields.values()), *(option.field for option in required)]
    required.sort(key=lambda option: order.index(option.field))
    groups = [OptionGroup("required", "", required)]
    for title, names in group_fields.items():
        groups.append(OptionGroup(title, "", [fields.pop(name) for name in names if name in fields]))
    groups.append(OptionGroup("other", "", list(fields.values())))
    groups += sorted(filter(lambda s: s.title, sections), key=lambda s: not s.title.startswith("model"))
    optional = (g._replace(options=[o for o in g.options if o not in required]) for g in groups[1:])
    return HelpPage(verb, note, [group for group in (groups[0], *optional, GENERAL) if group.options])


def format_help(page: HelpPage, width: int) -> str:
    """Format a page of help for a terminal of `width` columns."""
    needed = [" ".join((option.names[0], option.values)) for option in page.options if option.default is None]
    arguments = [f"[{option.names[0]}]" for option in page.options if not option.names[0].startswith("-")]
    for group in page.groups:
        if group.title == ONE_REQUIRED:
            needed.append(f"({' | '.join(f'{option.names[0]} {option.values}' for option in group.options)})")
    usage = " ".join(["usage: latentloom", page.verb, *arguments, *needed, "[options]"])
    summary = VERBS[page.verb]
    lines = [*_wrap_text(usage, width), "", *_wrap_text(f"{summary[0].upper()}{summary[1:]}. {page.note}", width)]
    for group in page.groups:
        lines += ["", f"{group.title}:"]
        if group.description:
            lines += [*_wrap_text(group.description, width, indent=2), ""]
        for option in group.options:
            lines += _format_option(option, width)
    return "\n".join(lines)


def _format_option(option: Option, width: int) -> list[str]:
    left = f"  {', '.join(option.names)} {option.values}".rstrip()
    text = f"{option.help} (default: {option.default})" if option.default else option.help
    right = _wrap_text(text, width, HELP_COLUMN)
    if len(left) <= HELP_COLUMN - 2:
        return [left.ljust(HELP_COLUMN) + right[0].lstrip(), *right[1:]]
    return [left, *right]


def _wrap_text(text: str, width: int, indent: int = 0) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        text,
        max(width, indent + 30),
        initial_indent=space,
        subsequent_indent=space,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _collect_sections(
    cls: Any, values: Any, name: str = "", description: str = "", choices: tuple[str, ...] = ()
) -> Iterator[OptionGroup]:
    """Yield the options of a dataclass as one group, then a group for each section in it.

    Args:
        values: An instance of `cls`, or None for the defaults of its fields.
        name: Name of the section, such as `model.quantizer`; empty at the top.
        choices: Names of the variants that the section may have.
    """
    cls = get_origin(cls) or cls
    hints, texts = get_type_hints(cls, include_extras=True), _read_field_docstrings(cls)
    options, sections = list[Option](), list[OptionGroup]()
    for field in dataclasses.fields(cls):
        default = _get_field_default(field) if values is None else getattr(values, field.name)
        hint, markers = _split_annotated(hints[field.name])
        path = f"{name}.{field.name}".lstrip(".")
        text = field.metadata.get("help", texts.get(field.name, ""))
        if WITHOUT_PREFIX in markers:
            sections += _collect_sections(type(default), default)
        elif dataclasses.is_dataclass(default):
            sections += _collect_sections(
                type(default), default, path, _split_default(text)[0], tuple(variants_by_name(hint))
            )
        elif field.name == "name" and choices:
            options.append(_make_option(path, hint, markers, default, text)._replace(values=f"{{{','.join(choices)}}}"))
        else:
            options.append(_make_option(path, hint, markers, default, text))
    yield OptionGroup(name.replace("_", "-"), description, options)
    yield from sections


def _make_option(field: str, hint: Any, markers: tuple[Any, ...], default: Any, text: str) -> Option:
    text, default_help = _split_default(text)
    section, _, name = field.replace("_", "-").rpartition(".")
    prefix = f"--{section}." if section else "--"
    names: tuple[str, ...] = (prefix + name,)
    if tyro.conf.Positional in markers:
        return Option(field, (name.upper(),), "", text, default_help or _format_default(default))
    if hint is bool:
        names = (prefix + name, f"{prefix}no-{name}")
    values = "none" if optional_section_type(hint) else format_values(hint)
    if default in (dataclasses.MISSING, tyro.MISSING):
        return Option(field, names, values, text, None)
    chosen_at_run_time = default is None or default == ()
    return Option(field, names, values, text, (chosen_at_run_time and default_help) or _format_default(default))


def format_values(hint: Any) -> str:
    """Return what an option of a type takes, such as `INT`, `{pad,refuse}` or `FLOAT FLOAT`; empty for a flag."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        parts = [format_values(argument) for argument in arguments if argument is not type(None)]
        return "TEXT" if "TEXT" in parts else "|".join(parts)
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin is tuple:
        parts = [format_values(argument) for argument in arguments if argument is not Ellipsis]
        return f"{parts[0].removesuffix(' ...')} ..." if Ellipsis in arguments else " ".join(parts)
    return TYPE_NAMES.get(hint, "")


def _format_default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _get_field_default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _split_annotated(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _split_default(text: str) -> tuple[str, str]:
    """Split "Text. (default: from the images)" into the text and the default."""
    match = re.fullmatch(r"(.*?)\s*(?:\(default: (.*)\))?", text)
    return (match[1], match[2] or "") if match else (text, "")


@cache
def _read_field_docstrings(cls: type) -> dict[str, str]:
    """Read the docstrings below the fields of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for statement, after in pairwise(definition.body):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    docstring = after.value if isinstance(after, ast.Expr) else None
                    if isinstance(docstring, ast.Constant) and isinstance(docstring.value, str):
                        texts[statement.target.id] = " ".join(docstring.value.split())
    return texts

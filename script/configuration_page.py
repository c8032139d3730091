"""Write docs/configuration.md: every field of an experiment, from the specs' annotations, defaults and docstrings."""

import inspect
import math
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from sniper.config.experiment import ExperimentSpec

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_INTRODUCTION = """\
# Configuration

<!-- Written by script/docs from the docstrings of the specs; edit those instead. -->

An experiment is one YAML file. Every field has a default, so a file contains only the fields that differ:

```yaml
data: {train: {annotations: train.json}, test: {annotations: test.json}}
train: {epochs: 12, batch_size: 16}
```

On the command line a field is set by its path: `--train.batch_size 32`. Unknown fields and values out of range are \
errors. Numbers are finite unless `.inf` is listed.
"""
_NAMES = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", types.NoneType: "`null`"}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A spec with the paths at which an experiment contains it."""

    spec: type[Any]
    paths: list[str]
    is_list: bool


def render_page() -> str:
    """Return the page as Markdown."""
    sections = sorted(find_sections(), key=lambda section: section.is_list)  # stable: those in lists last
    anchors = {section.spec: _anchor(_heading(section)) for section in sections}
    parts = [_INTRODUCTION, *(_render_section(section, anchors) for section in sections)]
    return "\n".join(parts)


def find_sections() -> list[Section]:
    """Return the specs of an experiment, each once, in the order of their first paths."""
    found: dict[type[Any], Section] = {}
    for path, spec, is_list in _walk(ExperimentSpec, ""):
        section = found.setdefault(spec, Section(spec=spec, paths=[], is_list=is_list))
        section.paths.append(path)
    return list(found.values())


def _walk(spec: type[Any], path: str, *, is_list: bool = False) -> Iterator[tuple[str, type[Any], bool]]:
    yield path, spec, is_list
    for name, hint in get_type_hints(spec).items():
        for nested in (hint, *get_args(hint)):
            if is_dataclass(nested) and isinstance(nested, type):
                nested_path = f"{path}.{name}".lstrip(".")
                yield from _walk(nested, nested_path, is_list=get_origin(hint) is tuple)


def _heading(section: Section) -> str:
    if section.paths == [""]:
        return "Sections"
    if section.is_list:
        return section.paths[0].rpartition(".")[2].capitalize()
    return _join_paths(section)


def _join_paths(section: Section) -> str:
    return ", ".join(f"`{path}`" for path in section.paths)


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _render_section(section: Section, anchors: dict[type[Any], str]) -> str:
    introduction, meanings = read_docstring(section.spec)
    hints = get_type_hints(section.spec, include_extras=True)
    rows = [
        f"| `{field.name}` | {_default(field)} | {_range(hints[field.name], anchors)} | {meanings[field.name]} |"
        for field in fields(section.spec)
    ]
    depth = "##" if "." not in section.paths[0] or section.is_list else "###"
    if section.is_list:
        introduction += f" The items of {_join_paths(section)}."
    head = ["| field | default | values | meaning |", "|---|---|---|---|"]
    return "\n".join([f"{depth} {_heading(section)}", "", introduction, "", *head, *rows, ""])


def read_docstring(spec: type[Any]) -> tuple[str, dict[str, str]]:
    """Split the docstring of a spec into its introduction and the meaning of each field.

    Raises:
        ValueError: if the docstring does not describe exactly the fields of the spec.
    """
    introduction, _, attributes = (inspect.getdoc(spec) or "").partition("\n\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", attributes, re.MULTILINE)
    names = [field.name for field in fields(spec)]
    if [name for name, _ in entries] != names:
        raise ValueError(
            f"{spec.__name__}: expected the attributes {names} in its docstring, got {attributes!r}"
        )
    paragraphs = [_to_yaml_words(paragraph) for paragraph in introduction.split("\n\n")]
    return "\n\n".join(paragraphs), {name: _to_yaml_words(text) for name, text in entries}


def _to_yaml_words(text: str) -> str:
    """Return prose on one line, with the values of YAML for those of Python."""
    text = re.sub(r"`?math\.inf`?", "`.inf`", " ".join(text.split()))
    text = re.sub(r"`docs/(\w+)\.md`", lambda page: f"[{page[1].capitalize()}]({page[1]}.md)", text)
    return re.sub(r"`?\bNone\b`?", "`null`", text).replace("|", r"\|")


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "required"
    if is_dataclass(field.default):
        return ""
    if isinstance(field.default, tuple) and field.default and is_dataclass(field.default[0]):
        return "<br>".join(f"`{_to_yaml(value)}`" for value in field.default)
    return f"`{_to_yaml(field.default)}`"


def _to_yaml(value: Any) -> str:
    """Return a value as YAML in flow style; fields of a spec that have their defaults are left out."""
    if is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        defaults = {field.name: field.default for field in fields(value)}
        entries = [f"{name}: {_to_yaml(given[name])}" for name in given if given[name] != defaults[name]]
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_to_yaml(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return ".inf" if value == math.inf else f"{value:.4g}" if value % 1 else f"{value:.0f}"
    return str(value) if value != "" else '""'


def _range(hint: Any, anchors: dict[type[Any], str]) -> str:
    """Describe the values that an annotation allows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _range(arguments[0], anchors) + _bounds(arguments[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(_range(argument, anchors) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        length = "" if arguments[-1] is ... else f" of {len(arguments)}"
        return f"list{length}: {_range(arguments[0], anchors)}"
    return f"[section](#{anchors[hint]})" if hint in anchors else _NAMES[hint]


def _bounds(metadata: tuple[Any, ...]) -> str:
    bounds = [
        f"{symbol} {_to_text(getattr(bound, name))}"
        for bound in metadata
        for kind, (name, symbol) in _BOUNDS.items()
        if isinstance(bound, kind)
    ]
    text = f" {', '.join(bounds)}" if bounds else ""
    if any(getattr(bound, "allow_inf_nan", False) for bound in metadata):
        text += " or `.inf`"
    if any(isinstance(bound, MinLen) for bound in metadata):
        text += "; at least one"
    text += "".join(f", at most {bound.max_length}" for bound in metadata if isinstance(bound, MaxLen))
    return text


def _to_text(bound: float) -> str:
    if bound == 2**63 - 1:
        return "2⁶³ − 1"
    return f"{bound:,.0f}" if float(bound).is_integer() and abs(bound) < 2**53 else f"{bound:g}"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")

"""Write the option tables of docs/fit_options.md from the classes that read `fit.json`.

python docs/fit_tables.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moecalc.benchmark import with_section
from moecalc.nn import DescriptorConfig, FittingConfig, ModelConfig, MoEConfig, PositionConfig, RouterConfig
from moecalc.training.options import LastStage, Options

PAGE = Path(__file__).with_name("fit_options.md")
BEGIN = "<!-- written by docs/fit_tables.py: begin -->"
END = "<!-- written by docs/fit_tables.py: end -->"
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("fit", Options),
    ("fit.last_stage", LastStage),
    ("model", ModelConfig),
    ("model.descriptor", DescriptorConfig),
    ("model.fitting", FittingConfig),
    ("model.moe", MoEConfig),
    ("model.moe.routers.NAME", RouterConfig),
    ("model.moe.positions.POSITION", PositionConfig),
)
LEFT_OUT = {"type_map"}  # follows from the frames
NAMES = {int: "whole number", float: "number", bool: "true, false", str: "text"}


def values(annotation: Any) -> str:
    """What an option takes, in words."""
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is list:
        return f"list of {values(arguments[0])}s" if get_origin(arguments[0]) is None else "list of pairs"
    if origin is tuple:
        return f"{len(arguments)} {values(arguments[0])}s"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "section"
    if arguments:  # an optional one
        return values(arguments[0])
    return NAMES[annotation]


def limits(field: FieldInfo) -> str:
    """Bounds of a number, such as ` > 0`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(entry, name):g}"
        for entry in field.metadata
        for name, sign in signs.items()
        if hasattr(entry, name)
    ]
    return " " + ", ".join(found) if found else ""


def default(field: FieldInfo) -> str:
    """Default as JSON would have it, or that the option must be given."""
    if field.is_required():
        return "required"
    value = field.default_factory() if field.default is PydanticUndefined else field.default
    if isinstance(value, BaseModel) or value in ({}, [], None):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
    )


def table(section: type[BaseModel]) -> Iterator[str]:
    """Lines of the table of one section."""
    yield "| option | values | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        if name not in LEFT_OUT:
            yield (
                f"| `{name}` | {values(field.annotation)}{limits(field)} | {default(field)} | "
                f"{field.description} |"
            )


def tables() -> str:
    """All sections, each under a heading of its own."""
    lines = []
    for name, section in SECTIONS:
        lines += [f"## {name}", "", *table(section), ""]
    return "\n".join(lines).rstrip()


def renewed(text: str) -> str:
    """The page with tables of today."""
    return with_section(text, BEGIN, END, tables())


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""The words of an error: where the wrong setting is, its value, what is wrong, and what would be right."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ftd.config.fields import SettingError


def syntax_problem(path: Path, text: str, error: tomllib.TOMLDecodeError) -> str:
    """The line for a file that is not TOML."""
    # Before Python 3.14 only the message has the place: "… (at line 3, column 7)", "… (at end of document)".
    match = re.fullmatch(r"(?s)(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error))
    message, line, column = match.groups() if match else (str(error), None, None)
    number = int(line) if line else text.count("\n") + 1
    lines = text.splitlines() or [""]
    quoted = lines[min(number, len(lines)) - 1].strip()
    place = f"line {number}" + (f", column {column}" if column else " (end of file)")
    return f"{path}: {place}: {message} in `{quoted}`; correct the TOML syntax there"


def problem(root: type[BaseModel], path: Path, data: dict[str, Any], detail: ErrorDetails) -> str:
    """The line for one thing in `data`, read from `path`, that is wrong by the model `root`."""
    location = list(detail["loc"])
    wrong = detail.get("ctx", {}).get("error")
    if isinstance(wrong, SettingError):
        location += [int(part) if part.isdigit() else part for part in wrong.key.split(".")]
    where = _where(root, location)
    value = _value_at(data, location)
    if value is not _ABSENT:
        where += f" = {_shown(value)}"
    return f"{path}: {where}: {_explanation(root, location, detail, value)}"


def _explanation(
    root: type[BaseModel], location: list[int | str], detail: ErrorDetails, value: object
) -> str:
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return f"is missing; {_hint(root, location)}"
    if kind == "extra_forbidden":
        what = "section" if len(location) == 1 and isinstance(value, dict) else "key"
        known = list(_keys_at(root, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown {what}; {remedy}"
    if kind == "literal_error":
        return f"is not one of the possible values; choose {context['expected']}"
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"is out of range; {_range(root, location)}"
    field = _field_at(root, location)
    if kind == "string_pattern_mismatch":
        return f"is not well-formed; {_hint(root, location)}"
    if kind == "string_too_short":
        return f"is empty; {_hint(root, location)}"
    wanted = _wanted_type(field.annotation if field else None, location)
    return f"is {_type_name(value)}; write {wanted}"


def _range(root: type[BaseModel], location: list[int | str]) -> str:
    """The bounds of a number, as in `give a whole number from 5 to 10000`."""
    field = _field_at(root, location)
    lower = upper = None
    for rule in field.metadata if field else ():
        lower = getattr(rule, "ge", lower)
        upper = getattr(rule, "le", upper)
    return (
        f"give a whole number from {lower} to {upper}"
        if upper is not None
        else f"give a whole number from {lower} up"
    )


def _hint(root: type[BaseModel], location: list[int | str]) -> str:
    """What a key means, in the first sentence of its description."""
    field = _field_at(root, location)
    if field is None or not field.description:
        section = _model_of(field.annotation) if field else None
        keys = [key for key, entry in section.model_fields.items() if entry.is_required()] if section else []
        return f"add the section with {', '.join(keys)}" if keys else "add it"
    first = re.split(r"\.(?:\s|$)", field.description, maxsplit=1)[0]
    return f"it is: {first[0].lower()}{first[1:]}"


_TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    str: "a string in quotes",
    Path: "a path in quotes",
}


def _wanted_type(annotation: Any, location: list[int | str]) -> str:
    if annotation is None:
        return "what docs/configure.md says"
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _wanted_type(typing.get_args(annotation)[0], location)
    if origin in (typing.Union, types.UnionType):
        return _wanted_type(typing.get_args(annotation)[0], location)
    if origin is Literal:
        return "one of " + ", ".join(_shown(choice) for choice in typing.get_args(annotation))
    if origin is tuple:
        item = typing.get_args(annotation)[0]
        if isinstance(location[-1], int):
            return _wanted_type(item, location)
        model = _model_of(item)
        return f"it as [[{'.'.join(map(str, location))}]]" if model else 'a list of strings: ["…", "…"]'
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section: [{'.'.join(map(str, location))}]"
    return _TYPE_WORDS.get(annotation, "another type")


def _type_name(value: object) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number with a fraction",
        str: "a string",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), f"a {type(value).__name__}")


class _Absent:
    """The value of a key that the file does not have."""


_ABSENT = _Absent()


def _where(root: type[BaseModel], location: list[int | str]) -> str:
    """Writes a place as people find it in the file: `[link] port`, `[[machine.nic]] number 2, mac`."""
    if len(location) == 1:
        return f"[{location[0]}]" if location[0] in root.model_fields else str(location[0])
    head, *rest = location
    number = next((place for place, part in enumerate(rest) if isinstance(part, int)), None)
    if number is not None and rest[0] in ("nic", "disk", "path"):
        key = ".".join(map(str, rest[number + 1 :]))
        return f"[[{head}.{rest[0]}]] number {int(rest[number]) + 1}" + (f", {key}" if key else "")
    return f"[{head}] " + "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in rest)


def _value_at(data: Any, location: list[int | str]) -> object:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return _ABSENT
    return data


def _walk(root: type[BaseModel], location: list[int | str]) -> Iterator[FieldInfo]:
    model: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        if field is None:
            return
        yield field
        model = _model_of(field.annotation)


def _field_at(root: type[BaseModel], location: list[int | str]) -> FieldInfo | None:
    fields = list(_walk(root, location))
    wanted = sum(isinstance(part, str) for part in location)
    return fields[-1] if fields and len(fields) == wanted else None


def _keys_at(root: type[BaseModel], location: list[int | str]) -> Iterator[str]:
    model: type[BaseModel] | None = root
    for field in _walk(root, location):
        model = _model_of(field.annotation)
    yield from model.model_fields if model else ()


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if (model := _model_of(argument)) is not None:
            return model
    return None


def _shown(value: object) -> str:
    """Writes a value as TOML does, shortened to what fits a line."""
    if isinstance(value, dict):
        return "{…}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"

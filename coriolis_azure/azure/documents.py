"""Validates Azure's documents: afterwards each property is either absent or of the documented form.

The models of the official SDKs define the form, or `forms` where no model is loaded. Names are matched
case-insensitively, as Azure does; properties that a form does not name are kept as they are, since Azure adds
properties all the time. A value of any other form is rejected with its path: ignoring it could mean losing a disk.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import Unreadable
from ..model import Json

_ANYTHING = (Any, object)


def understood(raw: Any, form: Any) -> Any:
    """`raw` without nulls, with names spelled as in `form`. Raises Unreadable if it has another form.

    A form is an SDK's model, a type, a list of one form, or a dictionary of forms by name. Properties that it does not
    name may be anything.
    """
    return _formed(raw, form, "")


def _formed(value: Any, promised: Any, where: str) -> Any:
    """`value`, checked against the promised form."""
    if isinstance(promised, dict):
        forms = {name.lower(): (name, form) for name, form in promised.items()}
        return _object(_a(dict, value, where), forms, where)
    if isinstance(promised, list):
        return _each(value, promised[0], where)
    if promised in _ANYTHING:
        return value
    origin, parts = get_origin(promised), get_args(promised)
    if origin in (Union, UnionType):
        return _one_of(value, [part for part in parts if part is not NoneType], where)
    if origin in (list, tuple, set):
        return _each(value, parts[0], where)
    if origin in (dict, Mapping):
        return {
            key: _formed(item, parts[1], f"{where}.{key}")
            for key, item in _a(dict, value, where).items()
            if item is not None
        }
    if fields := _fields(promised):
        return _object(_a(dict, value, where), fields, where)
    return _plain(value, promised, where)


def _each(value: Any, promised: Any, where: str) -> list[Any]:
    return [_formed(item, promised, f"{where}[{n}]") for n, item in enumerate(_a(list, value, where))]


def _object(value: Json, fields: Mapping[str, tuple[str, Any]], where: str) -> Json:
    """The properties under the model's spelling. Of two that differ only in case, the exact match wins."""
    document: Json = {}
    exact = {name for name, _ in fields.values()} & value.keys()
    for key, item in value.items():
        name, promised = fields.get(key.lower(), (key, Any))
        if item is not None and (key == name or name not in exact):
            document[name] = _formed(item, promised, f"{where}.{name}".lstrip("."))
    return document


def _one_of(value: Any, choices: list[Any], where: str) -> Any:
    """`value` in the first of several forms that fits. An enumeration accepts any text."""
    for choice in choices[:-1]:
        try:
            return _formed(value, choice, where)
        except Unreadable:
            continue
    return _formed(value, choices[-1], where)


def _plain(value: Any, promised: Any, where: str) -> Any:
    if promised in (bool, int):
        return _a(promised, value, where)
    if promised is float:
        return _a((int, float), value, where)
    # Text, and everything that JSON carries as text: dates, durations, enumeration values.
    return _a(str, value, where)


def _a(kind: type | tuple[type, ...], value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds: Iterable[type] = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(_WORDS[kind_] for kind_ in kinds)
        raise Unreadable(f"{where or 'the document'} is {_word(value)} where Azure documents {expected}")
    return value


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def _word(value: Any) -> str:
    return _WORDS.get(type(value), "null")


@cache
def _fields(model: Any) -> dict[str, tuple[str, Any]]:
    """The properties of an SDK model by lower-case name: Azure's spelling and the promised form; {} if not a model."""
    if not isinstance(model, type) or issubclass(model, Enum) or not issubclass(model, Mapping):
        return {}
    module = sys.modules[model.__module__]
    package = sys.modules[model.__module__.rpartition(".")[0]]
    scope = {**vars(module), "_models": package}
    fields = {}
    for attribute, hint in get_type_hints(model, scope).items():
        promised = _resolved(hint, scope)
        field = inspect.getattr_static(model, attribute, None)
        if hasattr(field, "_rest_name_input"):
            name = field._rest_name_input or attribute
            fields[str(name).lower()] = (str(name), promised)
    return fields


def _resolved(hint: Any, scope: dict[str, Any]) -> Any:
    """`hint` with quoted names resolved: Python 3.10 leaves those inside `list[...]` and `dict[...]` as text."""
    if isinstance(hint, str):
        return eval(hint, scope)  # noqa: S307 - part of the SDK's own source, as in get_type_hints
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Union:
        return Union[tuple(_resolved(part, scope) for part in parts)]  # noqa: UP007 - built from a tuple
    if origin in (list, dict):
        return origin[tuple(_resolved(part, scope) for part in parts)]
    return hint

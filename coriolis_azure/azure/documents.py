"""Azure's documents as everything behind the door may take them: each property absent, or of the promised form.

The official SDKs' models say what is promised. Names are matched without case, as Azure does it; what the models do
not know is kept as it is, since Azure adds properties all the time. A value of another form than promised is refused
with its path: to go on without it could mean to lose a disk.
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


def understood(raw: Any, model: type) -> Json:
    """`raw` with the names and forms of an SDK's `model`, without its nulls; Unreadable for anything else."""
    document: Json = _formed(raw, model, "")
    return document


def fitting(raw: Any, form: Any, where: str = "") -> Any:
    """`raw`, for which there is no model, without the nulls of what `form` names; Unreadable where the two differ.

    A form is a type, a list of one form, or an object of forms by name; what an object does not name may be anything.
    """
    if isinstance(form, list):
        return [fitting(item, form[0], f"{where}[{n}]") for n, item in enumerate(_a(list, raw, where))]
    if isinstance(form, dict):
        kept = {
            name: item for name, item in _a(dict, raw, where).items() if item is not None or name not in form
        }
        named = {
            name: fitting(kept[name], form[name], f"{where}.{name}".lstrip("."))
            for name in form
            if name in kept
        }
        return {**kept, **named}
    return _a(form, raw, where)


def _formed(value: Any, promised: Any, where: str) -> Any:
    """`value`, if it has the promised form."""
    if promised in _ANYTHING:
        return value
    origin, parts = get_origin(promised), get_args(promised)
    if origin in (Union, UnionType):
        return _one_of(value, [part for part in parts if part is not NoneType], where)
    if origin in (list, tuple, set):
        return [_formed(item, parts[0], f"{where}[{n}]") for n, item in enumerate(_a(list, value, where))]
    if origin in (dict, Mapping):
        return {
            key: _formed(item, parts[1], f"{where}.{key}")
            for key, item in _a(dict, value, where).items()
            if item is not None
        }
    if fields := _fields(promised):
        return _object(_a(dict, value, where), fields, where)
    return _plain(value, promised, where)


def _object(value: Json, fields: Mapping[str, tuple[str, Any]], where: str) -> Json:
    """The properties by the names of the model. Where two differ by case only, the exact one counts."""
    found: Json = {}
    exactly = {name for name, _ in fields.values()} & value.keys()
    for key, item in value.items():
        name, promised = fields.get(key.lower(), (key, Any))
        if item is not None and (key == name or name not in exactly):
            found[name] = _formed(item, promised, f"{where}.{name}".lstrip("."))
    return found


def _one_of(value: Any, choices: list[Any], where: str) -> Any:
    """`value` in the first of several forms that it has. The values of an enumeration are any text."""
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
    # Text, and what travels as text: dates, durations, the values of enumerations.
    return _a(str, value, where)


def _a(kind: type | tuple[type, ...], value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds: Iterable[type] = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_WORDS[one] for one in kinds)
        raise Unreadable(f"{where or 'the document'} is {_word(value)} where Azure promises {wanted}")
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
    """The properties of an SDK's model by lower-cased name: Azure's spelling, and the promised form; {} for others."""
    if not isinstance(model, type) or issubclass(model, Enum) or not issubclass(model, Mapping):
        return {}
    module = sys.modules[model.__module__]
    package = sys.modules[model.__module__.rpartition(".")[0]]
    scope = {**vars(module), "_models": package}
    found = {}
    for attribute, hint in get_type_hints(model, scope).items():
        promised = _resolved(hint, scope)
        field = inspect.getattr_static(model, attribute, None)
        if hasattr(field, "_rest_name_input"):
            name = field._rest_name_input or attribute
            found[str(name).lower()] = (str(name), promised)
    return found


def _resolved(hint: Any, scope: dict[str, Any]) -> Any:
    """`hint` without names in quotes: Python 3.10 leaves those inside `list[...]` and `dict[...]` unresolved."""
    if isinstance(hint, str):
        return eval(hint, scope)  # noqa: S307 - part of the SDK's own source, as in get_type_hints
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Union:
        return Union[tuple(_resolved(part, scope) for part in parts)]  # noqa: UP007 - of a tuple
    if origin in (list, dict):
        return origin[tuple(_resolved(part, scope) for part in parts)]
    return hint

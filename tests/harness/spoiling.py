"""Documents with values missing, null, of another form or under a name of another case; files that lose something."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

QUICK = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.just("x/../%2F?#\N{SNOWMAN}"),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
    st.sampled_from((0, -1, 10**30)),
    # Each time a new one: these are put into documents that are changed again.
    st.builds(list),
    st.builds(dict),
    st.builds(lambda: [None, 1, "a"]),
    st.builds(lambda: {"id": 7}),
)


def paths(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a document."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in pairs:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*at, key))


@st.composite
def spoilt(draw: st.DrawFn, documents: list[Any], but: tuple[Any, ...] | None = None) -> list[Any]:
    """The documents, one to three values of theirs spoilt; the one at the path `but` is kept in each."""
    changed = copy.deepcopy(documents)
    for _ in range(draw(st.integers(1, 3))):
        document = draw(st.sampled_from(changed))
        places = [path for path in paths(document) if path != but]
        if not places:
            continue
        *way, last = draw(st.sampled_from(places))
        holder: Any = document
        for step in way:
            holder = holder[step]
        match draw(st.sampled_from(("missing", "null", "odd", "renamed"))):
            case "missing":
                del holder[last]
            case "null":
                holder[last] = None
            case "odd":
                holder[last] = draw(ODD)
            case "renamed" if isinstance(holder, dict):
                holder[draw(st.sampled_from((str.upper, str.lower, str.swapcase)))(last)] = holder.pop(last)
    return changed


LOSSES = ("gone", "short", "damaged")


def lose(path: Path, how: str) -> None:
    """Take away a file, its end, or what it says."""
    if how == "gone":
        path.unlink()
    elif how == "short":
        os.truncate(path, 100)
    else:
        path.write_bytes(b"\xff" * path.stat().st_size)

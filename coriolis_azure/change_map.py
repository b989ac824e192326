"""What a run found on each part of a disk, in a map with so few cells that it is always small.

A chunk of the disk is of one kind. A cell of the map stands for as many neighbouring chunks as it takes to have at most
`CELLS` cells, so the cells of a large disk are mixed: for each kind, a cell has its share of the chunks.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .model import Json

CELLS = 256
Kind = Literal["zero", "same", "relied", "checked", "changed"]
# Holds only zeros; read, and not changed; not read, because Azure says that it has not changed; read all the same, and
# not changed; written by this run.
KINDS: tuple[Kind, ...] = ("zero", "same", "relied", "checked", "changed")
ALL = (
    15  # a cell is all of that kind; 0: nothing of it is; else its share, in fifteenths, but neither 0 nor 15
)


@dataclass(frozen=True)
class ChangeMap:
    """The map of a disk of `size` bytes. `cell_bytes`: what a cell stands for; the last one may stand for less.

    `shares`: by kind, for each cell a number from 0 to ALL. `totals`: by kind, the bytes of the whole disk.
    """

    size: int
    cell_bytes: int
    shares: Mapping[Kind, bytes]
    totals: Mapping[Kind, int]

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return -(-self.size // self.cell_bytes)

    def to_json(self) -> Json:
        """Plain JSON values."""
        packed = zlib.compress(b"".join(self.shares[kind] for kind in KINDS), 9)
        return {
            "size": self.size,
            "cell_bytes": self.cell_bytes,
            "totals": dict(self.totals),
            "cells": base64.b64encode(packed).decode(),
        }

    @classmethod
    def from_json(cls, document: Any) -> ChangeMap:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        size, cell, totals = document["size"], document["cell_bytes"], document["totals"]
        numbers = (size, cell, *(totals[kind] for kind in KINDS))
        if (
            any(type(number) is not int or not 0 <= number < 1 << 60 for number in numbers)
            or not size
            or not cell
        ):
            raise ValueError("the map has a wrong size")
        count = -(-size // cell)
        try:
            unpacking = zlib.decompressobj()
            cells = unpacking.decompress(
                base64.b64decode(document["cells"], validate=True), len(KINDS) * CELLS + 1
            )
        except (binascii.Error, zlib.error) as error:
            raise ValueError("the cells of the map are damaged") from error
        if count > CELLS or len(cells) != len(KINDS) * count or (cells and max(cells) > ALL):
            raise ValueError("the map has a wrong number of cells")
        shares = {kind: cells[at * count : (at + 1) * count] for at, kind in enumerate(KINDS)}
        return cls(size, cell, shares, {kind: totals[kind] for kind in KINDS})


class Tally:
    """Counts the chunks of each kind, by cell. For one thread."""

    def __init__(self, size: int, chunk: int) -> None:
        self._size, self._chunk = size, chunk
        self._count = -(-size // chunk)
        self._per = max(1, -(-self._count // CELLS))  # chunks of a cell
        cells = -(-self._count // self._per)
        self._chunks: dict[Kind, array[int]] = {kind: array("Q", bytes(8 * cells)) for kind in KINDS}
        self._last: Kind = "zero"  # of the last chunk, which may be shorter

    def add(self, kind: Kind, first: int, count: int) -> None:
        """Count chunks from `first` on."""
        chunks, end = self._chunks[kind], first + count
        for cell in range(first // self._per, -(-end // self._per)):
            start = cell * self._per
            chunks[cell] += min(end, start + self._per) - max(first, start)
        if end == self._count and count:
            self._last = kind

    def map(self) -> ChangeMap:
        """The map of what was counted."""
        cells = len(self._chunks["zero"])
        sums = [sum(self._chunks[kind][cell] for kind in KINDS) for cell in range(cells)]
        shares = {
            kind: bytes(_share(part, whole) for part, whole in zip(chunks, sums, strict=True))
            for kind, chunks in self._chunks.items()
        }
        totals = {kind: sum(chunks) * self._chunk for kind, chunks in self._chunks.items()}
        totals[self._last] = max(0, totals[self._last] - (self._count * self._chunk - self._size))
        return ChangeMap(self._size, self._per * self._chunk, shares, totals)


def _share(part: int, whole: int) -> int:
    """`part` of `whole` in fifteenths: 0 only for nothing, ALL only for all of it."""
    if part <= 0:
        return 0
    return ALL if part >= whole else min(ALL - 1, max(1, round(ALL * part / whole)))

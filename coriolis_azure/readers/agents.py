"""Reads a disk through an agent on the worker, reconnecting as often as needed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace

from ..errors import ConnectionLost, InvalidInput, StreamEnded
from ..events import Notice, counted
from ..replica.manifest import HASHES, UNKNOWN, ZERO, Manifest
from ..threads import Lock
from .channel import Direct
from .conversation import Dialogue, Job, Stream
from .flow import Flow
from .plan import Known, Run
from .reader import Chunk, Data, Question, Same, Zeros, corrupt

LEAF_SIZES = (0, 4096, 16384, 65536)
COMPRESSION = ("none", "auto", "always")
_FRUITLESS = 3  # connections in a row that may be lost before anything was settled


class AgentReader:
    """A Reader whose chunks come from an agent. After a lost connection it continues where it was.

    `start` starts a new agent; it is called again when the connection to the last one is lost, and an error from it
    ends the reading. `hang_up` makes a pending `start` end soon when the reader is closed. `direct`: the channel that
    carries the agent's messages instead of `start`'s stream, if allowed. `known` gives what is known of the disk before
    it is read. Raises InvalidInput for an invalid job.
    """

    def __init__(
        self,
        start: Callable[[], Stream],
        job: Job,
        flow: Flow,
        direct: Direct | None = None,
        hang_up: Callable[[], None] = lambda: None,
        known: Callable[[Manifest], Known] = lambda _: Known(),
    ) -> None:
        if job.leaf not in LEAF_SIZES:
            raise InvalidInput(f"a leaf cannot have {job.leaf} bytes, only one of {LEAF_SIZES}")
        if job.compress not in COMPRESSION:
            raise InvalidInput(
                f"compression {job.compress!r} is unknown; use one of {', '.join(COMPRESSION)}"
            )
        self._start, self._job, self._flow, self._direct, self._hang_up = start, job, flow, direct, hang_up
        self._known_of, self._known = known, Known()
        self.read_bytes = 0  # those of chunks that an agent had to read again are counted once
        self._lock, self._closed = Lock(), False
        self._dialogue: Dialogue | None = None
        self._base: (
            Manifest  # what the destination will hold once every reported chunk is there; set by `begin`
        )
        self._agreed = False  # whether an agent has opened the disk, so that the hash is fixed
        # Every chunk before `_next` is settled, except those in `_asked`, whose questions are open.
        self._next, self._asked = 0, set[int]()
        self._settled_before = self._fruitless = 0

    def begin(self, base: Manifest, *, unit: int) -> Manifest:
        """See Reader. Raises AgentFailed, StreamEnded, or an error from `start`."""
        if self._job.size != base.size:
            raise ValueError(f"the job has {self._job.size} bytes, the manifest {base.size}")
        leaf = max(self._job.leaf, unit) if self._job.leaf and unit else 0
        self._job = replace(self._job, leaf=leaf if leaf < base.chunk else 0)
        self._base = replace(base, digests=base.digests.copy())
        self._known = self._known_of(base)
        self._connect()
        if self._base.hash != base.hash and not base.fresh:
            text = f"this worker cannot compute {base.hash}, so everything is compared anew, with {self._base.hash}"
            self._flow.report(Notice(f"{self._flow.disk}: {text}"))
        return self._base

    def scan(self) -> Generator[Chunk | Question, None, None]:
        """See Reader."""
        while self._dialogue is not None:
            try:
                with self._dialogue as dialogue:
                    for item in dialogue.chunks():
                        if isinstance(item, Run):
                            yield from self._passed_over(dialogue, item)
                        else:
                            yield from self._unsettled(dialogue, item)
                return
            except ConnectionLost as error:
                self._count_lost(error)
            self._connect()

    def _passed_over(self, dialogue: Dialogue, run: Run) -> Iterator[Chunk]:
        """The part of a run that is not read which was not reported before."""
        rest = replace(run, chunks=range(max(run.chunks.start, self._next), run.chunks.stop))
        if not rest.chunks:
            return
        dialogue.plan.rely(rest)
        if rest.fate == "zeros":
            self._base.digests.put(rest.chunks.start, ZERO * len(rest.chunks))
        self._next = rest.chunks.stop
        yield rest.as_chunks()

    def _unsettled(self, dialogue: Dialogue, item: Chunk | Question) -> Iterator[Chunk | Question]:
        """The part of `item` that no earlier agent has settled."""
        base = self._base
        chunks = range(item.index, item.index + (1 if isinstance(item, Data) else item.count))
        settled = [
            index for index in range(chunks.start, min(chunks.stop, self._next)) if self._is_settled(index)
        ]
        if settled and not isinstance(item, Same):
            offset = base.span(settled[0])[0]
            raise corrupt(self._flow.disk, offset, "had different content after the connection was lost")
        checked = self._count(dialogue, item, range(max(chunks.start, self._next), chunks.stop))
        if isinstance(item, Question):
            self._asked.update(chunks)
        else:
            self._asked.difference_update(chunks)
        if isinstance(item, Zeros | Data):
            base.digests.put(item.index, (ZERO if isinstance(item, Zeros) else item.digest) * len(chunks))
        self._next = max(self._next, chunks.stop)
        if not settled and not (checked and isinstance(item, Same)):
            yield item
            return
        for index in chunks:
            if index not in settled:
                yield Same(index, 1, "checked" if index in checked else "read")

    def _count(self, dialogue: Dialogue, item: Chunk | Question, chunks: Iterable[int]) -> set[int]:
        """Count what was read for these chunks of an item, and compare it with what is known of the disk.

        Returns those that a list of changes says have not changed.
        """
        checked = set[int]()
        if self._known.is_nothing:
            self.read_bytes += sum(self._base.span(index)[1] for index in chunks)
            return checked
        for index in chunks:
            self.read_bytes += dialogue.read_of(index)
            digest = UNKNOWN  # whatever it is, it is not that of the base
            if isinstance(item, Same):
                digest = self._base.digest(index)
            elif not isinstance(item, Question):
                digest = ZERO if isinstance(item, Zeros) else item.digest
            if dialogue.plan.compare(index, digest):
                checked.add(index)
        return checked

    def _is_settled(self, index: int) -> bool:
        return index < self._next and index not in self._asked

    def _connect(self) -> None:
        """Start a new agent at the first chunk that is not settled."""
        while True:
            try:
                self._talk(self._start())
            except ConnectionLost as error:
                self._count_lost(error)
            else:
                return

    def _talk(self, stream: Stream) -> None:
        base, first = self._base, min(self._asked, default=self._next)
        dialogue = Dialogue(stream, self._job, base, first, self._flow, self._direct)
        with self._lock:
            self._dialogue, closed = dialogue, self._closed
        try:
            if closed:
                raise StreamEnded("the transfer was cancelled")
            # The digests of settled chunks remain in use, so every later agent must use the first one's hash.
            others = () if self._agreed else tuple(name for name in HASHES if name != base.hash)
            self._base = dialogue.begin(
                (base.hash, *others), self._known, choose=base.fresh and not self._agreed
            )
            self._agreed = True
        except BaseException:
            dialogue.close()
            raise

    def _count_lost(self, error: ConnectionLost) -> None:
        """Report that another agent takes over; raise the error after `_FRUITLESS` agents without progress."""
        base = self._base
        settled = self._next - len(self._asked)
        self._fruitless = 0 if settled > self._settled_before else self._fruitless + 1
        self._settled_before = settled
        if self._closed or self._fruitless == _FRUITLESS:
            raise error
        done = min(base.size, self._next * base.chunk) - sum(base.span(index)[1] for index in self._asked)
        text = f"{self._flow.disk}: {error}; continuing after {done} of {base.size} bytes"
        self._flow.report(Notice(text))
        is_direct = self._dialogue is not None and self._dialogue.is_direct
        if self._fruitless == _FRUITLESS - 1 and is_direct and self._direct is not None:
            self._direct.give_up(f"the direct channel was lost {counted(self._fruitless, 'time')} in a row")

    @property
    def root(self) -> tuple[int, str]:
        """See Reader."""
        return self._dialogue.root if self._dialogue is not None else (0, "")

    def bottleneck(self) -> str:
        """See Reader."""
        return self._flow.bottleneck()

    def close(self) -> None:
        """See Reader."""
        with self._lock:
            self._closed, dialogue = True, self._dialogue
        self._hang_up()
        if dialogue is not None:
            dialogue.close()

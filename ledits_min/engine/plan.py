"""What a run will evaluate, known before it starts: `loop` follows the plan, `ledits edit --explain` prints it.

The network is asked about rows (executed step, text, latents that it reads). Nothing is evaluated that cannot change
the result: skipped steps, equal texts twice, concepts that are idle at a step. Rows that do not wait for each other
share calls, and rows about the same x_t share what the network does before it looks at the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from ledits_min.engine.maps import Look, Recording
from ledits_min.guidance import EditSettings, guided_texts
from ledits_min.inversion import InversionSettings
from ledits_min.p2p import Lending, source_texts

# Whose latents a row reads: the edit's own x_t, the picture's noisy copy, or the source's way through an edit (P2P).
EDIT, INVERSION, SOURCE = "editing", "inverting", "source"


class Row(NamedTuple):
    """One question to the network, for every picture of the batch."""

    step: int
    text: str
    reads: str = EDIT


@dataclass(frozen=True)
class Phase:
    """All evaluations of one loop.

    groups    of rows; a group waits for the one before it, the rows of a group wait for nothing. Where the first row
              reads the source's latents, it may lend its attention maps to the second, and both must share a call
    images    pictures that every row is evaluated for: an evaluation is one row of one picture
    capacity  evaluations that one call of the network may hold
    naive     evaluations of the published loop: skipped steps inverted too, two branches and one per concept to edit
    recording what is recorded of the rows' attention
    """

    name: str
    groups: tuple[tuple[Row, ...], ...]
    images: int
    capacity: int
    naive: int
    recording: Recording | None = None

    def looks(self, row: Row) -> list[Look]:
        """What the attention of its words is looked at for."""
        if self.recording is None or row.reads == INVERSION:
            return []
        return self.recording.looks(row.step, row.text, row.reads == SOURCE)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that is evaluated, in the order of its first use."""
        return tuple(dict.fromkeys(row.text for row in self.rows))

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for group in self.groups for row in group)

    @property
    def evaluations(self) -> int:
        return len(self.rows) * self.images

    @property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """Evaluations in each call of the network, group by group."""
        sizes = [(len(group) * self.images, has_pair(group)) for group in self.groups]
        return tuple(split_evenly(size, self.capacity, pairs) if size else () for size, pairs in sizes)

    @property
    def largest_batch(self) -> int:
        return max(size for sizes in self.batches for size in sizes)

    @property
    def parts(self) -> dict[str, tuple[Row, ...]]:
        """The rows by whose latents they read; all under the phase's own name where there is one kind alone."""
        kinds = [kind for kind in (INVERSION, EDIT, SOURCE) if any(row.reads == kind for row in self.rows)]
        if len(kinds) == 1:
            return {self.name: self.rows}
        return {kind: tuple(row for row in self.rows if row.reads == kind) for kind in kinds}


def inputs(group: Sequence[Row]) -> tuple[int, ...]:
    """Which x_t each row reads, counted in the order of their first use: rows of one step and kind read the same."""
    number: dict[tuple[str, int], int] = {}
    return tuple(number.setdefault((row.reads, row.step), len(number)) for row in group)


def has_pair(group: Sequence[Row]) -> bool:
    """Whether the first two rows are the source's and the target's, of which one may lend its maps to the other."""
    return bool(group) and group[0].reads == SOURCE


def ranges(rows: Sequence[Row]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(first step, last step, texts) of consecutive steps that evaluate the same texts."""
    steps = [(step, tuple(row.text for row in same)) for step, same in groupby(rows, lambda row: row.step)]
    for texts, same in groupby(steps, lambda item: item[1]):
        indices = [step for step, _ in same]
        yield indices[0], indices[-1], texts


def inversion_phase(inversion: InversionSettings, images: int, capacity: int) -> Phase:
    """The inversion: one group, because the noisy copies of a picture are independent of each other."""
    texts = guided_texts("", inversion.source, inversion.source_guidance_scale)
    rows = tuple(Row(step, text, INVERSION) for step in range(inversion.executed_steps) for text in texts)
    return Phase("inverting", (rows,), images, capacity, naive=len(texts) * inversion.num_steps * images)


def editing_phase(
    name: str,
    inversion: InversionSettings,
    settings: EditSettings,
    images: int,
    capacity: int,
    lending: Lending | None = None,
) -> Phase:
    """The editing: one group per step. While the source goes along, its row and the target's come first."""
    groups = []
    for step in range(inversion.executed_steps):
        rows = [Row(step, text) for text in settings.texts(step)]
        if lending is not None and lending.needs_source(step, settings):
            source, *guiding = (Row(step, text, SOURCE) for text in source_texts(inversion))
            target = Row(step, settings.target)
            rows = [source, target, *(row for row in rows if row != target), *guiding]
        groups.append(tuple(rows))
    branches = 2 + len(settings.terms) + 2 * (lending is not None)
    return Phase(name, tuple(groups), images, capacity, naive=branches * inversion.executed_steps * images)


def one_pass_phase(inversion: InversionSettings, settings: EditSettings, images: int, capacity: int) -> Phase:
    """Inversion and edit in the same calls: one group per step, the edit's rows first.

    An editing step needs the inversion of the same step and of none behind it. So the inversion runs as far ahead as
    there is room in calls that are made anyway. As long as the edit retraces the inversion (both are guided alike, no
    concept acts and no momentum is let go) its predictions for the inversion's texts are the inversion's own, and not
    evaluated again, but where their attention is wanted too.
    """
    inverting = inversion_phase(inversion, images, capacity)
    editing = editing_phase("", inversion, settings, images, capacity)
    source_texts = guided_texts("", inversion.source, inversion.source_guidance_scale)
    texts = guided_texts(settings.negative, settings.target, settings.guidance_scale)
    alike = len(texts) == 1 or settings.guidance_scale == inversion.source_guidance_scale
    waiting, retraces = deque(inverting.rows), True  # both begin at x_T, however they are guided
    groups = []
    for step, wanted in enumerate(editing.groups):
        alone = settings.attending(step)
        rows = [row for row in wanted if not (retraces and row.text in source_texts and row.text not in alone)]
        needed = sum(row.step == step for row in waiting)
        calls = -(-(len(rows) + needed) * images // capacity)
        room = calls * capacity // images - len(rows)
        groups.append((*rows, *(waiting.popleft() for _ in range(min(room, len(waiting))))))
        pulling = [term for term in settings.terms if term.pulls]
        let_go = settings.momentum_scale > 0.0 and pulling and all(term.is_warm(step) for term in settings.terms)
        moved = let_go or any(term.acts(step) for term in pulling)
        retraces = retraces and texts == source_texts and alike and not moved
    return Phase("inverting and editing", tuple(groups), images, capacity, inverting.naive + editing.naive)


def split_evenly(total: int, most: int, pairs: bool = False) -> tuple[int, ...]:
    """`total` in as few parts of at most `most` as there can be, larger ones first, sizes as even as they can be.

    With `pairs` every part but the last is even, and holds at least 2: no pair is torn apart.
    """
    if pairs:
        sizes = [2 * size for size in split_evenly(-(-total // 2), max(1, most // 2))]
        sizes[-1] -= total % 2
        return tuple(sizes)
    parts = -(-total // most)
    size, more = divmod(total, parts)
    return (size + 1,) * more + (size,) * (parts - more)

"""`ledits sweep`: one or two numbers of an edit against each other, as a labelled sheet and as JSON.

Which cells there are is decided from the options alone, before torch is imported.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ledits_min.app.cli.options import check_ranges
from ledits_min.app.inputs import (
    check_concepts,
    concept_fields,
    edit_settings,
    inversion_settings,
    invert_picture,
    only_where,
)
from ledits_min.app.values import CONCEPT_KEYS, P2P_KEYS
from ledits_min.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from ledits_min import Inversion, LEdits, Progress
    from ledits_min.app.terminal import Clock
    from ledits_min.engine.progress import Callback

MAX_CELLS = 100
WRAP = 10  # pictures in a row where one list alone is swept
INVERSION = ("steps", "skip", "eta", "seed", "source_guidance_scale")  # what an inversion depends on
NAMES = {"guidance_scale": "target scale", "source_guidance_scale": "source scale", "momentum_scale": "momentum"}


@dataclass(frozen=True)
class Axis:
    """An option, by its name in the namespace, and the values it takes in turn."""

    name: str
    values: tuple[Any, ...]

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def heading(self, value: Any) -> str:
        number = str(value) if isinstance(value, int | str) else f"{value:.10g}"
        return f"{NAMES.get(self.name, self.name.replace('_', ' '))} {number}"


@dataclass(frozen=True)
class Grid:
    """What is swept. cells[i][j] are the options of row i and column j, with one value each."""

    across: Axis
    down: Axis | None
    cells: list[list[argparse.Namespace]]

    @property
    def axes(self) -> list[Axis]:
        return [self.across] if self.down is None else [self.down, self.across]

    def __iter__(self) -> Iterator[tuple[int, int, argparse.Namespace]]:
        """(row, column, options) of every cell, row by row."""
        for i, row in enumerate(self.cells):
            for j, cell in enumerate(row):
                yield i, j, cell

    def __len__(self) -> int:
        return len(self.cells) * len(self.across.values)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Grid:
        """InputError unless one or two options are lists, every value is in its range and has an effect."""
        axes = [Axis(name, values) for name, values in getattr(args, "listed", {}).items()]
        if not axes:
            raise InputError("nothing is swept; give one or two options a list, as in --scale 0,3,7 --skip 20,36")
        if len(axes) > 2:
            named = ", ".join(axis.option for axis in axes)
            raise InputError(f"{named} are lists and a sheet has two sides; give one value to all but two of them")
        count = math.prod(len(axis.values) for axis in axes)
        if count > MAX_CELLS:
            raise InputError(f"{count} cells are asked for and a sheet holds {MAX_CELLS}; shorten a list")
        _refuse_idle(args)
        across, down = axes[0], axes[1] if len(axes) == 2 else None
        rows: list[dict[str, Any]] = [{}] if down is None else [{down.name: value} for value in down.values]
        cells = [[_with(args, {**row, across.name: value}) for value in across.values] for row in rows]
        grid = cls(across, down, cells)
        for _, _, cell in grid:
            check_ranges(cell)
        return grid


def _with(args: argparse.Namespace, values: Mapping[str, Any]) -> argparse.Namespace:
    cell = copy.copy(args)
    vars(cell).update(values)
    return cell


def _refuse_idle(args: argparse.Namespace) -> None:
    """InputError for an option, a list or not, that could change nothing."""
    concepts, listed = args.concepts or [], getattr(args, "listed", {})
    for name, (field_name, _) in CONCEPT_KEYS.items():
        if getattr(args, name) is None:
            continue
        if not concepts:
            raise InputError(f"--{name} is of concepts, and there is none; pass --add or --remove")
        if all(field_name in concept for concept in concepts):
            raise InputError(f"--{name} has no effect: every concept sets its own; leave one of them out")
    for name in P2P_KEYS:
        if getattr(args, name) is not None and (args.p2p is None or name in args.p2p):
            why = "there is no --p2p; pass it" if args.p2p is None else "--p2p sets its own; leave one of them out"
            raise InputError(f"--{name} has no effect: {why}")
    for name, needs, there in (
        ("guidance_scale", "--target", bool(args.target)),
        ("source_guidance_scale", "--source", bool(args.source)),
        ("momentum_scale", "--add or --remove", bool(concepts)),
        ("momentum_beta", "--momentum-scale", "momentum_scale" in listed or args.momentum_scale > 0.0),
    ):
        if name in listed and not there:
            raise InputError(f"--{name.replace('_', '-')} is swept and has no effect without {needs}; pass that too")


def attention_of(cell: argparse.Namespace) -> dict[str, Any] | None:
    """The fields of its `PromptToPrompt`, likewise."""
    if cell.p2p is None:
        return None
    shared = {name: getattr(cell, name) for name in P2P_KEYS if getattr(cell, name) is not None}
    return {**shared, **cell.p2p}


@dataclass(frozen=True)
class Edited:
    """A cell that was run: its picture, small; the settings of `outputs.settings`; its entry in the JSON."""

    picture: Image.Image
    settings: dict[str, Any]
    entry: dict[str, Any]


def run(
    grid: Grid,
    ledits: LEdits,
    picture: Image.Image,
    made: Inversion | None,
    side: int,
    callback: Callback | None = None,
) -> tuple[list[list[Edited]], list[dict[str, Any]]]:
    """Every cell, its picture within `side` pixels, and what each inversion took: one for all cells that can share it.

    With `made` there is none to make. `callback`, RunError and InputError as of `LEdits.invert` and `LEdits.edit`.
    """
    from ledits_min.engine.progress import progress_bar

    groups: dict[tuple[Any, ...], list[tuple[int, int, argparse.Namespace]]] = {}
    for i, j, cell in grid:
        # What the model does not allow (a skip beyond its own steps, masks of attention): now, not after ten cells.
        inversion_settings(cell, ledits)
        check_concepts(cell, ledits)
        groups.setdefault(tuple(getattr(cell, name) for name in INVERSION), []).append((i, j, cell))
    edited: dict[tuple[int, int], Edited] = {}
    inversions: list[dict[str, Any]] = []
    with progress_bar("sweeping", len(grid), "cell", wanted=True) as bar:

        def follow(progress: Progress) -> object:
            bar.set_postfix_str(f"{progress.phase} {progress.done}/{progress.total}")
            return callback is not None and callback(progress)

        for group in groups.values():
            inversion, start = made, time.perf_counter()
            if inversion is None:
                inversion = invert_picture(group[0][2], ledits, picture, progress=False, callback=follow)
                seconds, count = time.perf_counter() - start, ledits.runner.evaluations["inverting"]
                inversions.append({"evaluations": count, "seconds": round(seconds, 3)})
            for i, j, cell in group:
                entry = {"row": i, "column": j, "values": {axis.name: getattr(cell, axis.name) for axis in grid.axes}}
                if made is None:
                    entry["inversion"] = len(inversions) - 1
                edited[i, j] = _edited(cell, ledits, inversion, picture, side, entry, follow)
                bar.update()
    return [[edited[i, j] for j in range(len(grid.across.values))] for i in range(len(grid.cells))], inversions


def _edited(
    cell: argparse.Namespace,
    ledits: LEdits,
    inversion: Inversion,
    picture: Image.Image,
    side: int,
    entry: Mapping[str, Any],
    follow: Callback,
) -> Edited:
    from ledits_min import Concept, PromptToPrompt
    from ledits_min.app import outputs
    from ledits_min.app.sheet import fitted

    concepts = [Concept(**fields) for fields in concept_fields(cell)]
    shared = attention_of(cell)
    attention = None if shared is None else PromptToPrompt(**shared)
    options, start = edit_settings(cell, ledits), time.perf_counter()
    result = ledits.edit(
        inversion, concepts=concepts, attention=attention, progress=False, callback=follow,
        mask_image=cell.only_where, **options,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    settings = outputs.settings(ledits, inversion, concepts, attention, {**options, **only_where(cell)})
    numbers = {
        "evaluations": ledits.runner.evaluations["editing"],
        "seconds": round(seconds, 3),
        "change_rms": _difference(picture, result.images[0]),
        "masks": outputs.mask_statistics(settings["concepts"], [mask[0] for mask in result.masks]),
        "settings": settings,
    }
    return Edited(fitted(result.images[0], side), settings, {**entry, **numbers})


def _difference(picture: Image.Image, edited: Image.Image) -> float:
    """Root mean square over pixels and colours, in levels of 255."""
    import numpy as np

    before = picture if picture.size == edited.size else picture.resize(edited.size)
    change = np.asarray(edited, dtype=np.float32) - np.asarray(before, dtype=np.float32)
    return round(float(np.sqrt(np.square(change).mean())), 4)


def cell_side(grid: Grid, picture: Image.Image) -> int:
    """Pixels of one picture on the sheet: more where there are few, never more than there are."""
    columns = min(len(grid.across.values), WRAP if grid.down is None else MAX_CELLS)
    return min(max(192, 2000 // columns), max(192, *picture.size), 512)


def draw(
    grid: Grid, edited: Sequence[Sequence[Edited]], picture: Image.Image, side: int, caption: Sequence[str]
) -> Image.Image:
    """The sheet: the original and everything that is fixed on top, then the cells under and beside their values."""
    from ledits_min.app.sheet import Cell, contact_sheet

    lead = Cell("original", picture)
    derived = all(cell.skip is None for _, _, cell in grid)

    def heading(axis: Axis, value: Any, one: Edited) -> str:
        of_its_own = axis.name == "steps" and derived
        return axis.heading(value) + (f" (skip {one.settings['skip']})" if of_its_own else "")

    columns = [heading(grid.across, value, one) for value, one in zip(grid.across.values, edited[0], strict=True)]
    if grid.down is None:
        cells = [Cell(label, one.picture) for label, one in zip(columns, edited[0], strict=True)]
        rows = [cells[start : start + WRAP] for start in range(0, len(cells), WRAP)]
        return contact_sheet(rows, cell=side, lead=lead, caption=caption)
    sides = [heading(grid.down, value, row[0]) for value, row in zip(grid.down.values, edited, strict=True)]
    rows = [[Cell("", one.picture) for one in row] for row in edited]
    return contact_sheet(rows, cell=side, columns=columns, sides=sides, lead=lead, caption=caption)


def numbers(
    grid: Grid,
    edited: Sequence[Sequence[Edited]],
    inversions: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    clock: Clock,
    notices: Sequence[str],
    device: str,
) -> bytes:
    """The JSON beside the sheet; a cell's `inversion` is its place in `inversions`."""
    from ledits_min.app import outputs

    return outputs.as_json({
        "across": {"option": grid.across.option, "values": list(grid.across.values)},
        "down": grid.down and {"option": grid.down.option, "values": list(grid.down.values)},
        "settings": shared,
        "versions": outputs.versions(),
        "device": device,
        "seconds": {phase: round(value, 3) for phase, value in clock.laps.items()},
        "notices": list(notices),
        "inversions": list(inversions),
        "cells": [one.entry for row in edited for one in row],
    })  # fmt: skip

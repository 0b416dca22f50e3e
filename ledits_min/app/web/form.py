"""The values of the page, as a browser sends them: read strictly into what an edit takes, and written back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ledits_min import Concept, InputError
from ledits_min.app.values import SOLVERS
from ledits_min.app.web.models import CUSTOM, Facts
from ledits_min.app.web.session import Basis, Change, Edit, Remembered
from ledits_min.config import MASKS
from ledits_min.engine.request import check_text
from ledits_min.errors import check_number, check_whole, quoted

ROWS = 6  # concepts at a time
FIELDS = 7  # of a row
NUMBERS = 10  # values that are no row's: prompts, target scale, the inversion
ADD, REMOVE = "add", "remove"
MAX_WORDS = 2000  # characters of a prompt

Row = list[Any]


def read_form(values: Sequence[Any]) -> tuple[Basis, Change]:
    """[target, source, negative, target scale, steps, skip, seed, eta, size, solver, count of rows, their fields]."""
    target, source, negative, guidance, steps, skip, seed, eta, size, solver = values[:NUMBERS]
    count, rows = values[NUMBERS], in_rows(values[NUMBERS + 1 :])
    for name, value in (("steps", steps), ("skip", skip), ("seed", seed)):
        if value is None:
            raise InputError(f"{name} is empty; give a whole number")
    check_number("target scale", guidance, 0.0, 1000.0)
    check_number("eta", eta, 0.0, 1.0)
    if solver not in SOLVERS:
        raise InputError(f"solver is {quoted(solver, 40)}; {' or '.join(SOLVERS)} is wanted")
    order = SOLVERS.index(solver) + 1
    if order == 2 and eta != 1.0:
        raise InputError(f"solver dpm++ is defined for eta 1 alone, and eta is {eta:g}")
    steps, count = _whole("steps", steps, 1, 500), _whole("the number of concepts", count, 1, ROWS)
    skip = _whole(f"skip (with {steps} steps)", skip, 0, steps - 1)
    seed, size = _whole("seed", seed, 0, 2**63 - 1), _whole("size", 0 if size is None else size, 0, 4096)
    concepts = tuple(_concept(row) for row in rows[:count] if _text("a concept", row[1]))
    basis = Basis(steps, skip, _text("source", source), float(eta), seed, size or None, order)
    change = Change(float(guidance), concepts, _text("target", target), _text("negative", negative))
    if not concepts and not change.target:
        raise InputError("nothing is asked for; say what to add or remove, or give a target")
    return basis, change


def write_form(basis: Basis, change: Change, facts: Facts) -> list[Any]:
    """The values that `read_form` reads."""
    rows = [_as_row(concept, facts) for concept in change.concepts]
    numbers = [change.target, basis.source, change.negative, change.guidance_scale, basis.num_steps, basis.skip,
               basis.seed, basis.eta, basis.size or 0, SOLVERS[basis.solver_order - 1]]  # fmt: skip
    return [*numbers, max(1, len(rows)), *(value for row in filled(rows, facts) for value in row)]


def in_rows(values: Sequence[Any]) -> list[Row]:
    if len(values) != ROWS * FIELDS:
        raise InputError("the page sent other fields than it has; reload it")
    return [list(values[start : start + FIELDS]) for start in range(0, len(values), FIELDS)]


def filled(rows: Sequence[Row], facts: Facts) -> list[Row]:
    return [*rows, *(fresh_row(facts) for _ in range(ROWS - len(rows)))]


def fresh_row(facts: Facts) -> Row:
    """A row without words."""
    return [ADD, "", *default_numbers(facts)]


def default_numbers(facts: Facts) -> Row:
    """Of a concept: scale, threshold, warm-up, cool-down; and its mask."""
    defaults = facts.defaults
    return [defaults.concept_guidance_scale, defaults.threshold, defaults.warmup_steps, 0, defaults.mask]


def kind_of(facts: Facts, row: Sequence[Any]) -> str:
    """The preset that has a row's numbers."""
    names = (name for name, preset in facts.presets.items() if tuple(row[2:5]) == preset.numbers)
    return next(names, CUSTOM)


def index_of(told: Any, among: Sequence[Any], what: str) -> int:
    """Which of several was clicked; `told` is what the browser says of it."""
    index = told.get("index") if isinstance(told, dict) else None
    if type(index) is not int or not 0 <= index < len(among):
        raise InputError(f"there is no such {what} here")
    return index


def remember(entries: Sequence[Edit | Remembered], facts: Any, thumbnails: Sequence[str]) -> str:
    """The history as a browser keeps it; `facts` gives those of a model by its name."""
    return json.dumps([
        {"model": each.model, "source": each.source, "thumbnail": thumbnail,
         "values": write_form(each.basis, each.change, facts(each.model))}
        for each, thumbnail in zip(entries, thumbnails, strict=True)
    ])  # fmt: skip


def recall(text: Any, models: Sequence[str], most: int) -> list[tuple[dict[str, str], Basis, Change]]:
    """What `remember` wrote, as far as this page can use it: it comes from a browser and may hold anything."""
    try:
        entries = json.loads(text) if isinstance(text, str) and text else []
    except (ValueError, RecursionError):
        return []
    found = []
    for entry in entries[-most:] if isinstance(entries, list) else ():
        try:
            named = {key: entry[key] for key in ("model", "source", "thumbnail")}
            basis, change = read_form(entry["values"])
        except (TypeError, KeyError, ValueError, IndexError):
            continue
        if all(isinstance(value, str) for value in named.values()) and named["model"] in models:
            found.append((named, basis, change))
    return found


def _concept(row: Row) -> Concept:
    mode, text, scale, threshold, warmup, cooldown, mask = row
    if mode not in (ADD, REMOVE):
        raise InputError(f"a concept is {quoted(mode, 40)}; {ADD} or {REMOVE} is wanted")
    text = _text("a concept", text)
    name = quoted(text, 60)
    check_number(f"the scale of {name}", scale, 0.0, 1000.0)
    check_number(f"the threshold of {name}", threshold, 0.0, 1.0)
    warmup = _whole(f"the first step of {name}", warmup, 0, 100_000)
    cooldown = _whole(f"the last step of {name}", 0 if cooldown is None else cooldown, 0, 100_000)
    if mask not in MASKS:
        raise InputError(f"the mask of {name} is {quoted(mask, 40)}; the choices are {', '.join(MASKS)}")
    numbers = float(scale), float(threshold), warmup, cooldown or None
    return Concept(text, *numbers, reverse=mode == REMOVE, mask=mask)


def _as_row(concept: Concept, facts: Facts) -> Row:
    return [REMOVE if concept.reverse else ADD, concept.text, concept.guidance_scale, concept.threshold,
            concept.warmup_steps, concept.cooldown_steps or 0, concept.mask or facts.defaults.mask]  # fmt: skip


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is no text; reload the page")
    if len(value) > MAX_WORDS:
        raise InputError(f"{name} has {len(value)} characters; at most {MAX_WORDS} are read")
    check_text(name, value)
    return value.strip()


def _whole(name: str, value: Any, low: int, high: int) -> int:
    """A browser may write 4.0 for 4."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    check_whole(name, whole, low, high)
    return int(whole)

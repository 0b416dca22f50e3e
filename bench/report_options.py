"""The part of RESULTS.md that tells what LEDITS++'s options buy: what bench/study/options.py has measured."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report_cells import Json, percent, ratio, spread, table

METHODS = """\
Each row edits the same unseen portraits, {portraits} of each of {edits} edits, at its own scale and threshold by what
is edited: what is small, what is large, what goes in reverse (`METHODS` of bench/study/options.py; the preset `fast`
has the tuned numbers of what is small, for all). *Evaluations*: of the UNet per picture, inversion and edit; rows with
equally many can be compared line by line. *More* is against the first row, portrait by portrait: an interval on one
side of 0 is a difference. Brackets are 95 % intervals."""
REMOVALS = """\
{portraits} portraits of each. In reverse, the prediction for the thing is guided away from; by phrase, the one for its
absence ("no glasses") is guided to; at once, both. The mask says where: SEGA's by percentiles, or where the words are
attended to, or both."""


def quality(line: Json) -> list[str]:
    """Cells of every row: success, other attributes kept, fidelity, and nearness to the ideal."""
    return [
        f"{percent(line['success'])} {spread(line['success_interval'], 100.0, 0)}",
        ratio(line["kept_ratio"]),
        f"{line['outside_db']:.1f} {spread(line['outside_db_interval'])}",
        f"{line['gain_db']:.1f} {spread(line['gain_db_interval'])}",
    ]


QUALITY = ["success", "kept", "outside, dB", "gain, dB"]


def more(value: float, interval: Sequence[float], unit: float = 1.0) -> str:
    low, high = (unit * bound for bound in interval)
    return f"{unit * value:+.1f} [{low:+.1f}, {high:+.1f}]"


def about(found: Json) -> str:
    return f"`{found['command']}`, {found['processor']}, networks in {found['dtype']}."


def options_text(methods: Json | None, removals: Json | None) -> list[str]:
    return (methods_text(methods) if methods else []) + (removals_text(removals) if removals else [])


def methods_text(found: Json) -> list[str]:
    """LEDITS++'s options beside LEDITS."""
    first = found["rows"][0]
    lines = ["## LEDITS++'s masks and solver, and few steps: what they buy, evaluation by evaluation", ""]
    lines += [METHODS.format(portraits=found["portraits"], edits=len(first["edits"])), "", about(found), ""]
    header = ["method", "evaluations", *QUALITY, "nearer"]
    header += ["more success, points", "more outside, dB", "more gain, dB", "gain: add", "change", "remove"]
    rows = [
        [
            line["method"],
            f"{line['evaluations']:.0f}",
            *quality(line),
            f"{percent(line['closer'])} {spread(line['closer_interval'], 100.0, 0)}",
            *(
                "-" if line is first else more(line[f"{name}_more"], line[f"{name}_more_interval"], unit)
                for name, unit in (("success", 100.0), ("outside_db", 1.0), ("gain_db", 1.0))
            ),
            *(f"{line[f'gain_db_{group}']:.1f}" for group in ("add", "change", "remove")),
        ]
        for line in found["rows"]
    ]
    lines += table(header, rows)
    lines += ["**Success by edit** (gain towards the ideal edit, dB)", ""]
    edits = list(first["edits"])
    rows = [
        [
            line["method"],
            f"{line['evaluations']:.0f}",
            *(f"{percent(e['success'])} ({e['gain_db']:.1f})" for e in line["edits"].values()),
        ]
        for line in found["rows"]
    ]
    return lines + table(["method", "evaluations", *edits], rows)


def removals_text(found: Json) -> list[str]:
    """The ways to remove something."""
    lines = ["## Removing: in reverse, by a phrase of absence, by both", ""]
    lines += [REMOVALS.format(portraits=found["portraits"]), "", about(found), ""]
    rows = [[line["edit"], line["way"], f"{line['evaluations']:.0f}", *quality(line)] for line in found["rows"]]
    return lines + table(["edit", "way", "evaluations", *QUALITY], rows)

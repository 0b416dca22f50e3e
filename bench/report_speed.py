"""The part of RESULTS.md that tells how long things take: every figure with the place where it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping

from bench.report_cells import Json, table


def place_of(line: Json) -> str:
    """The conditions that an entry was measured under."""
    return json.dumps(line.get("conditions", {}), sort_keys=True).replace('"', "").strip("{}")


def places(found: Json) -> dict[str, str]:
    """Every place that the entries of a file name, and the letter that stands for it in a table."""
    return {place: chr(ord("a") + n) for n, place in enumerate(sorted({place_of(line) for line in found.values()}))}


def places_text(letters: Mapping[str, str]) -> list[str]:
    return [line for place, letter in letters.items() for line in (f"({letter}) {place}", "")]


def wanted_ratio(name: str, settings: Json) -> str:
    """How many times as fast as the peer an edit was to be; a dash where nothing was said."""
    dtype, prompts, compiled = (settings[key] for key in ("dtype", "prompts", "compile"))
    on_gpu = name.startswith("cuda")
    edit = tuple(settings[key] for key in ("size", "steps", "skip", "concepts", "images"))
    if edit != ((512, 100, 36, 2, 1) if on_gpu else (512, 20, 7, 2, 1)):
        return "-"
    if on_gpu:
        return "-" if dtype != "fp16" or prompts else "2.5" if compiled else "4"
    if dtype != "bf16" or compiled:
        return "-"
    return "5" if settings["peer_dtype"] != dtype else "1.6" if prompts else "2"


def peers_text(stem: str, found: Json) -> list[str]:
    """Whole edits, ours beside the published loop on diffusers."""
    rows, letters = [], places(found)
    for name, line in found.items():
        sides = [line[side] for side in ("ours", "peer")]
        seconds = [f"{sum(side['seconds'].values()):.1f}" for side in sides]
        rows.append([
            name, *seconds, f"{line['ratio']:g}", wanted_ratio(name, line["settings"]),
            str(sides[0].get("second_edit_seconds", "-")),
            *(str(side["evaluations"]) for side in sides),
            *(f"{side['peak_memory_GB']:g}" for side in sides), f"{sides[0]['flop_utilisation']:.0%}",
            letters[place_of(line)],
        ])  # fmt: skip
    header = [
        "edit", "ours, s", "peer, s", "ratio", "wanted", "second edit, s", "evaluations", "peer's", "GB", "peer's",
        "nominal share of the matmul rate", "where",
    ]  # fmt: skip
    return [f"## {stem}.json", "", *places_text(letters), *table(header, rows)]


def alone_text(stem: str, found: Json) -> list[str]:
    """The UNet alone, every side's seconds and what they are to ours."""
    rows, letters = [], places(found)
    for name, line in found.items():
        for batch, sides in line.items():
            if batch != "conditions":
                told = (f"{side} {s['seconds']:g} ({s['to_ours']:g})" for side, s in sides.items())
                rows.append([name, batch, ", ".join(told), letters[place_of(line)]])
    return [f"## {stem}.json", "", *places_text(letters), *table(["", "", "seconds (to ours)", "where"], rows)]


def growth_text(found: Json, picture: str) -> list[str]:
    """How an edit's time grows with each dial; the plot, and its points."""
    base = ", ".join(f"{name} {value}" for name, value in found["base"].items())
    where = f"{found['dtype']}, {found['device']}, {base}; {place_of(found)}"
    lines = ["## growth.json", "", where, "", f"![How an edit's time grows]({picture})", ""]
    rows = [
        [dial, f"{one['value']:g}", *(f"{side['seconds']:.1f}" for side in (one, other)),
         *(str(side["evaluations"]) for side in (one, other)), *(f"{side['peak_GB']:g}" for side in (one, other))]
        for dial, points in found["ours"].items()
        for one, other in zip(points, found["peer"][dial], strict=True)
    ]  # fmt: skip
    header = ["dial", "value", "ours, s", "peer, s", "evaluations", "peer's", "GB", "peer's"]
    return [*lines, *table(header, rows)]


def benchmark_text(stem: str, found: Json) -> list[str]:
    """A file of pytest-benchmark measurements: seconds, and whatever else each one noted."""
    rows, letters = [], places(found)
    for name, line in found.items():
        seconds = line["seconds"]
        extra = {key: value for key, value in line.items() if key not in ("seconds", "rounds", "conditions")}
        noted = ", ".join(f"{key} {json.dumps(value)}" for key, value in extra.items())
        whole = f"{seconds['min']:g} .. {seconds['max']:g}"
        rows.append([name, f"{seconds['median']:g}", whole, noted, letters[place_of(line)]])
    header = ["what", "median, s", "range, s", "noted", "where"]
    return [f"## {stem}.json", "", *places_text(letters), *table(header, rows)]

"""The job table of `ledits batch`: JSONL, CSV, or a folder of pictures; read strictly, and without torch.

A defect of the table is an InputError. A defect of one row is that job's `fault`, and nobody else's.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ledits_min.app.cli.options import check_ranges
from ledits_min.app.values import SOLVERS, parse_concept, parse_number, parse_prompt, parse_size, parse_whole
from ledits_min.config import MASKS
from ledits_min.errors import InputError, quoted
from ledits_min.files.door import read_file

PICTURE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".heif",
)  # fmt: skip
MAX_TABLE = 64_000_000  # bytes
NAME_BYTES = 255  # what file systems take


@dataclass(frozen=True)
class Job:
    """One row.

    line     of the file, or the place in the folder, from 1
    image    as it is written in the row; `path` is where that is
    output   name of the picture to write, in the output folder
    options  the edit's, by their names on the command line; None is the model's own default
    fault    why it cannot be done; "" where nothing is wrong with the row itself
    """

    line: int
    image: str
    path: Path
    output: str
    options: Mapping[str, Any]
    fault: str = ""


def read_jobs(table: Path, args: argparse.Namespace) -> list[Job]:
    """Every row of the table, in its order; what a row does not set is as given on the command line."""
    given = {name: getattr(args, name) for name in (*OPTIONS, "concepts")}
    given["concepts"] = given["concepts"] or []
    given["only_where"] = None if args.only_where is None else os.path.abspath(args.only_where)
    place = table.absolute()  # a worker may stand elsewhere
    if table.is_dir():
        jobs = [_job(number, {"image": name}, place, given) for number, name in _pictures(table)]
    else:
        jobs = [_job(line, row, place.parent, given) for line, row in _rows(table)]
    if not jobs:
        wanted = f"no picture ({', '.join(PICTURE_SUFFIXES)})" if table.is_dir() else "no row"
        raise InputError(f"{quoted(table)} holds {wanted}; there is nothing to do")
    first: dict[str, Job] = {}
    for job in jobs:
        other = first.setdefault(job.output, job)
        if other is not job and job.output:
            raise InputError(
                f"{quoted(table)}: {quoted(other.image)} (line {other.line}) and {quoted(job.image)} (line {job.line}) "
                f"would both write {quoted(job.output)}; give each its own name, in the column output of a table"
            )
    return jobs


def left_out(table: Path) -> list[str]:
    """Of a folder of pictures: a line on what in it is not taken, and why."""
    if not table.is_dir():
        return []
    found: dict[str, list[str]] = {}
    for entry in sorted(table.iterdir()):
        if entry.name.startswith("."):
            found.setdefault("hidden", []).append(entry.name)
        elif entry.is_dir():
            found.setdefault("a folder, which is not searched", []).append(entry.name)
        elif not entry.name.lower().endswith(PICTURE_SUFFIXES):
            found.setdefault("no picture by the name's ending", []).append(entry.name)
    named = [f"{_few(names)} ({why})" for why, names in found.items()]
    return [f"left out of {quoted(table)}: {', '.join(named)}"] if named else []


def _few(names: list[str]) -> str:
    shown = ", ".join(quoted(name, 60) for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _pictures(folder: Path) -> Iterator[tuple[int, str]]:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and not entry.is_dir())
    return enumerate((name for name in names if name.lower().endswith(PICTURE_SUFFIXES)), start=1)


# --- rows -----------------------------------------------------------------------------------------------------------


class _Text(str):
    """A cell of a CSV file, which may stand for a number or a list."""


Row = dict[str, Any]
Concept = dict[str, Any]  # its fields


def _rows(table: Path) -> Iterator[tuple[int, Row]]:
    """(line, what the row sets) of a file."""
    readers: dict[str, Callable[[str, str], Iterator[tuple[int, Row]]]] = {
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".csv": _csv_rows,
    }
    name = quoted(table)
    if table.suffix.lower() not in readers:
        raise InputError(f"{name} is neither a .jsonl or .csv file nor a folder of pictures")
    try:
        text = read_file(table, "a job table", MAX_TABLE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}, line {line} is not UTF-8 text; save the table as UTF-8") from None
    return readers[table.suffix.lower()](text, name)


def _jsonl_rows(text: str, name: str) -> Iterator[tuple[int, Row]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        where = f"{name}, line {line}"
        try:
            row = json.loads(content, object_pairs_hook=_pairs, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {quoted(error, 100)}; a row is one object on one line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} holds {quoted(content.strip(), 40)}; an object with an image is wanted")
        _check_columns(row, where)
        yield line, {column: value for column, value in row.items() if value is not None}


def _pairs(pairs: list[tuple[str, Any]]) -> Row:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a column is set twice")
    return dict(pairs)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = (line, f"{name}, line {line}"), reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _check_separator(header, where[1])
                _check_columns(header, where[1])
                if "image" not in header:
                    raise InputError(f"{where[1]}: no column is named image; the first line names the columns")
                continue
            if len(cells) != len(header):
                raise InputError(f"{where[1]} has {len(cells)} cells, the first line names {len(header)} columns")
            yield where[0], {column: _Text(cell) for column, cell in zip(header, cells, strict=True) if cell.strip()}
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num} is not CSV: {error}") from None


def _check_separator(header: list[str], where: str) -> None:
    for separator, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and header[0].split(separator)[0].strip() in COLUMNS and separator in header[0]:
            raise InputError(f"{where}: the columns are separated by {called}; save the table with commas between them")


def _check_columns(columns: Any, where: str) -> None:
    seen = set()
    for column in columns:
        if column not in COLUMNS:
            raise InputError(f"{where}: column {quoted(column, 60)} is unknown; they are {', '.join(COLUMNS)}")
        if column in seen:
            raise InputError(f"{where}: column {column} is there twice")
        seen.add(column)


def _job(line: int, row: Row, folder: Path, given: Mapping[str, Any]) -> Job:
    values, faults = dict[str, Any](), []
    for column, value in row.items():
        try:
            values[column] = COLUMNS[column](value)
        except argparse.ArgumentTypeError as error:
            faults.append(f"line {line}, column {column}: {error}")
    if "image" not in row:
        faults.append(f"line {line}, column image: it is not set; a picture is wanted")
    image = values.pop("image", "")
    output = values.pop("output", f"{Path(image).stem}.png" if image and "output" not in row else "")
    if "only_where" in values:
        values["only_where"] = str(folder / values["only_where"])
    concepts = _merged(given["concepts"], values.pop("add", None), values.pop("remove", None))
    faults += [
        f"line {line}, column {column}: it is of concepts, and this job has none; add or remove one, or leave it out"
        for column in ("mask", "only_where")
        if not concepts and (column in values or (column == "only_where" and given[column] is not None))
    ]
    options = {**given, **values, "concepts": concepts}
    if not faults:
        try:
            check_ranges(argparse.Namespace(**options), lambda field: f"line {line}, column {field}")
        except InputError as error:
            faults.append(str(error))
    return Job(line, image, folder / image, output, options, "; ".join(faults))


def _merged(given: list[Concept], add: list[Concept] | None, remove: list[Concept] | None) -> list[Concept]:
    """A row's own concepts to add take the place of those given to add; likewise to remove."""
    if add is None and remove is None:
        return given
    added = [concept for concept in given if not concept["reverse"]] if add is None else add
    removed = [concept for concept in given if concept["reverse"]] if remove is None else remove
    return added + removed


# --- values ---------------------------------------------------------------------------------------------------------


def _wrong(value: Any, wanted: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{quoted(json.dumps(value), 60)} is not {wanted}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(value, "a text")
    return parse_prompt(str(value))


def _image(value: Any) -> str:
    path = _text(value)
    if not path or "\0" in path:
        raise _wrong(value, "the path of a picture")
    return path


def _whole(value: Any) -> int:
    if isinstance(value, _Text):
        return parse_whole(value.strip())
    if type(value) is not int:
        raise _wrong(value, "a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, _Text):
        return parse_number(value.strip())
    if type(value) not in (int, float):
        raise _wrong(value, "a number")
    number: float = value
    return number


def _size(value: Any) -> int | tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value):
        return value[0], value[1]
    if type(value) is not int and not isinstance(value, str):
        raise _wrong(value, "a longer side (512), WxH (512x384) or [W, H]")
    return value if type(value) is int else parse_size(str(value).strip())


def _one_of(choices: Sequence[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise _wrong(value, f"{', '.join(choices[:-1])} or {choices[-1]}")
        return str(value)

    return read


def _output(value: Any) -> str:
    """The name of a PNG: it carries the hash by which a finished job is known again."""
    name = _text(value)
    if not name.lower().endswith(".png") or os.path.basename(name) != name or len(name.encode()) > NAME_BYTES:
        raise argparse.ArgumentTypeError(f"{quoted(name, 80)} is not the name of a .png file without a folder")
    if not name.isprintable():
        raise argparse.ArgumentTypeError(f"{quoted(name, 80)} holds control characters; choose another name")
    return name


def _concepts(reverse: bool) -> Callable[[Any], list[Concept]]:
    """Reads a text in the command line's syntax, or a list of them; a CSV cell may hold the list as JSON."""

    def read(value: Any) -> list[Concept]:
        if isinstance(value, _Text) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise _wrong(value, "a JSON list") from None
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise _wrong(value, "a concept such as sunglasses:scale=10, or a list of them")
        return [parse_concept(str(text), reverse) for text in texts]

    return read


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "source": _text,
    "target": _text,
    "negative": _text,
    "steps": _whole,
    "skip": _whole,
    "eta": _number,
    "solver": _one_of(SOLVERS),
    "seed": _whole,
    "size": _size,
    "guidance_scale": _number,
    "source_guidance_scale": _number,
    "momentum_scale": _number,
    "momentum_beta": _number,
    "mask": _one_of(MASKS),
    "only_where": _image,
    "output_size": _one_of(("input", "model")),
}
COLUMNS: dict[str, Callable[[Any], Any]] = {
    "image": _image,
    "output": _output,
    "add": _concepts(False),
    "remove": _concepts(True),
    **OPTIONS,
}

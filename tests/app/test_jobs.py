"""The job table: what a row may say, and what is said of one that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledits_min.app.batch.jobs import COLUMNS, Job, left_out, read_jobs
from ledits_min.app.cli.options import build_parser
from ledits_min.errors import InputError

FULL = {
    "image": "p.png", "output": "o.png", "add": ["hat:scale=3", "beard"], "remove": "glasses", "source": "a face",
    "target": "a hat", "negative": "sad", "steps": 10, "skip": 3, "eta": 0.5, "seed": 7, "size": "256x128",
    "guidance_scale": 5, "source_guidance_scale": 2.5, "momentum_scale": 0.1, "momentum_beta": 0.2,
    "output_size": "model", "solver": "ddpm", "mask": "both", "only_where": "where.png",
}  # fmt: skip


def jobs_of(path: Path, content: str | bytes, *argv: str) -> list[Job]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_jobs(path, build_parser().parse_args(["batch", str(path), "-o", "out", *argv]))


def test_jsonl_and_csv_say_the_same(tmp_path: Path) -> None:
    cells = {**FULL, "add": json.dumps(FULL["add"]), "remove": json.dumps(["glasses"])}
    quoted = ",".join('"' + str(cell).replace('"', '""') + '"' for cell in cells.values())
    (one,) = jobs_of(tmp_path / "t.jsonl", json.dumps(FULL) + "\n")
    (other,) = jobs_of(tmp_path / "t.csv", ",".join(cells) + "\r\n" + quoted + "\r\n")
    assert set(FULL) == set(COLUMNS)
    assert one.fault == other.fault == ""
    assert one.options == other.options
    assert (one.line, other.line, one.output, one.path) == (1, 2, "o.png", tmp_path / "p.png")
    assert [(c["text"], c["reverse"]) for c in one.options["concepts"]] == [
        ("hat", False), ("beard", False), ("glasses", True)
    ]  # fmt: skip
    assert one.options["size"] == (256, 128)
    assert one.options["concepts"][0]["guidance_scale"] == 3.0


def test_the_command_line_fills_what_a_row_leaves_open(tmp_path: Path) -> None:
    given = ["--steps", "12", "--remove", "beard", "--add", "hat", "--target", "a man"]
    own = {"image": "b.png", "steps": 4, "add": "smile", "target": ""}
    rows = [{"image": "a.png"}, own, {"image": "c.png", "add": []}]
    jobs = jobs_of(tmp_path / "t.jsonl", "\n\n".join(map(json.dumps, rows)), *given)
    assert [job.line for job in jobs] == [1, 3, 5]
    assert [job.options["steps"] for job in jobs] == [12, 4, 12]
    assert [job.options["target"] for job in jobs] == ["a man", "", "a man"]
    words = [[(c["reverse"], c["text"]) for c in job.options["concepts"]] for job in jobs]
    assert words == [[(True, "beard"), (False, "hat")], [(False, "smile"), (True, "beard")], [(True, "beard")]]


def test_a_mask_needs_a_concept(tmp_path: Path) -> None:
    """A row's own, or the command line's region; the command line's way to make masks is for whatever concepts come."""
    rows = [{}, {"mask": "both"}, {"add": "hat", "mask": "both", "only_where": "m.png"}, {"only_where": "m.png"}]
    table = "\n".join(json.dumps({"image": f"{n}.png", "target": "hat", **row}) for n, row in enumerate(rows))
    faults = [job.fault for job in jobs_of(tmp_path / "t.jsonl", table, "--mask", "noise")]
    assert [bool(fault) for fault in faults] == [False, True, False, True]
    assert "line 2, column mask: it is of concepts, and this job has none" in faults[1]
    faults = [job.fault for job in jobs_of(tmp_path / "t.jsonl", table, "--only-where", "m.png")]
    assert [bool(fault) for fault in faults] == [True, True, False, True]


def test_a_folder_is_its_pictures_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.png").mkdir()
    jobs = read_jobs(tmp_path, build_parser().parse_args(["batch", str(tmp_path), "-o", "out", "--seed", "3"]))
    assert [(job.line, job.image, job.output) for job in jobs] == [(1, "a.JPG", "a.png"), (2, "b.png", "b.png")]
    assert jobs[0].options["seed"] == 3


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"steps": "10"}, "column steps: '\"10\"' is not a whole number"),
        ({"steps": 10.0}, "column steps: '10.0' is not a whole number"),
        ({"seed": True}, "column seed: 'true' is not a whole number"),
        ({"eta": "much"}, "column eta: '\"much\"' is not a number"),
        ({"solver": "ddim"}, "column solver: '\"ddim\"' is not ddpm or dpm"),
        ({"solver": "dpm++", "eta": 0.5}, "column solver dpm++ is defined for line 2, column eta 1 alone"),
        ({"eta": 1.5}, "column eta is 1.5; a number in 0 .. 1 is wanted"),
        ({"steps": 0}, "column steps is 0; a whole number in 1 .. 500"),
        ({"steps": 10, "skip": 10}, "column skip is 10; a whole number in 0 .. 9"),
        ({"seed": -1}, "column seed is -1"),
        ({"guidance_scale": 10**400}, "column guidance_scale is 1000"),
        ({"size": [1, 2, 3]}, "column size: '[1, 2, 3]' is not a longer side"),
        ({"size": [1, "2"]}, "is not a longer side"),
        ({"add": "hat:scale=2000"}, "column add 'hat': scale is 2000.0; a number in 0 .. 1000"),
        ({"size": "big"}, "column size: 'big' is neither a longer side"),
        ({"target": 3}, "column target: '3' is not a text"),
        ({"add": 3}, "column add: '3' is not a concept"),
        ({"add": ["hat", 3]}, "column add: .* is not a concept"),
        ({"add": "hat:scales=3"}, "column add: 'scales=3' is no concept option"),
        ({"remove": ""}, "column remove: '' names no concept"),
        ({"output": "o.jpg"}, "column output: 'o.jpg' is not the name of a .png file"),
        ({"output": "../o.png"}, "column output: '../o.png' is not the name of a .png file without a folder"),
        ({"output": "a" * 256 + ".png"}, "column output: .* is not the name of a .png file"),
        ({"output_size": "both"}, "column output_size: '\"both\"' is not input or model"),
        ({"image": ""}, "column image: '\"\"' is not the path of a picture"),
        ({"image": None}, "column image: it is not set"),
        ({"image": "a\x00b"}, "column image: .* is not the path of a picture"),
        ({"target": "\ud800"}, "column target: .* is not UTF-8 text"),
    ],
)
def test_a_bad_value_is_the_fault_of_its_row_alone(tmp_path: Path, row: dict[str, object], says: str) -> None:
    rows = [{"image": "a.png"}, {"image": "b.png", **row}, {"image": "c.png"}]
    jobs = jobs_of(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    assert [job.fault == "" for job in jobs] == [True, False, True]
    assert jobs[1].fault.startswith("line 2, column ")
    assert re.search(says if ".*" in says else re.escape(says), jobs[1].fault), jobs[1].fault


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", '{"image": "a.png"}\n{"image": "b.png", "step": 3}', r"line 2: column 'step' is unknown; they "),
        ("t.jsonl", '{"image": "a.png"}\n{"image": ', r"line 2 is not JSON"),
        ("t.jsonl", '{"image": "a.png", "image": "b.png"}', r"line 1 is not JSON: 'a column is set twice'"),
        ("t.jsonl", '{"image": "a.png", "eta": NaN}', r"line 1 is not JSON: 'NaN is no number'"),
        ("t.jsonl", "[" * 100_000, r"line 1 is not JSON"),
        ("t.jsonl", '"a.png"', r"line 1 holds .*; an object with an image is wanted"),
        ("t.jsonl", "\n\n", r"holds no row"),
        ("t.jsonl", b'{"image": "a.png"}\n{"image": "\xff"}', r"line 2 is not UTF-8"),
        ("t.jsonl", '{"image": "a.png"}\n{"image": "x/a.jpg"}', r"'x/a.jpg' \(line 2\) would both write 'a.png'"),
        ("t.csv", "image,steps\na.png,3,4\n", r"line 2 has 3 cells, the first line names 2 columns"),
        ("t.csv", "image,image\na.png,b.png\n", r"line 1: column image is there twice"),
        ("t.csv", "picture\na.png\n", r"line 1: column 'picture' is unknown"),
        ("t.csv", "steps\n3\n", r"line 1: no column is named image"),
        ("t.csv", 'image\n"a.png\n', r"line 2 is not CSV"),
        ("t.csv", "image\n", r"holds no row"),
        ("t.csv", "", r"is an empty file; a job table is wanted here"),
        ("t.csv", "image;steps\na.png;3\n", r"line 1: the columns are separated by semicolons; save the table with"),
        ("t.csv", "image\tsteps\na.png\t3\n", r"separated by tabs"),
        ("t.txt", "a.png", r"neither a .jsonl or .csv file nor a folder"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        jobs_of(tmp_path / name, content)


def test_a_size_may_be_a_list(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path / "t.jsonl", json.dumps({"image": "a.png", "size": [512, 384]}))
    assert job.options["size"] == (512, 384)


def test_what_a_folder_leaves_out_is_said(tmp_path: Path) -> None:
    for name in ("b.png", "a.HEIC", ".hidden.png", "notes.txt", "1.cr2", "2.cr2", "3.cr2", "4.cr2"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (line,) = left_out(tmp_path)
    assert "'1.cr2', '2.cr2', '3.cr2', '4.cr2' and 1 more (no picture by the name's ending)" in line
    assert "'sub' (a folder, which is not searched)" in line
    assert "'.hidden.png' (hidden)" in line
    for name in ("notes.txt", "1.cr2", "2.cr2", "3.cr2", "4.cr2", ".hidden.png"):
        (tmp_path / name).unlink()
    (tmp_path / "sub").rmdir()
    assert left_out(tmp_path) == []


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_a_table_that_never_ends_is_refused(tmp_path: Path, target: str) -> None:
    path = tmp_path / "t.csv"
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    with pytest.raises(InputError, match="is not a regular file; a job table is wanted"):
        read_jobs(path, build_parser().parse_args(["batch", str(path), "-o", "out"]))


def test_tables_that_are_not_there(tmp_path: Path) -> None:
    args = build_parser().parse_args(["batch", "x", "-o", "out"])
    with pytest.raises(InputError, match="does not exist"):
        read_jobs(tmp_path / "t.csv", args)
    with pytest.raises(InputError, match="holds no picture"):
        read_jobs(tmp_path, args)


def test_a_csv_cell_may_span_lines_and_bring_a_mark(tmp_path: Path) -> None:
    text = '\ufeffimage,target\n\n"a.png","a man,\nsmiling"\nb.png,\nc.png,"x"\n'
    jobs = jobs_of(tmp_path / "t.csv", text, "--target", "given")
    assert [(job.line, job.options["target"]) for job in jobs] == [(3, "a man,\nsmiling"), (5, "given"), (6, "x")]


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text())
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(COLUMNS)), VALUES))
def test_any_row_is_taken_or_told(tmp_path_factory: pytest.TempPathFactory, row: dict[str, object]) -> None:
    (job,) = jobs_of(tmp_path_factory.getbasetemp() / "any.jsonl", json.dumps(row))
    assert job.fault == "" or job.fault.startswith("line 1, column ")
    assert job.fault or job.image


def test_reading_a_table_needs_no_torch() -> None:
    code = "import sys, ledits_min.app.batch.jobs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

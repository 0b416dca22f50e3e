"""Numbers, texts and names that cannot be meant: one line, exit code 2, nothing written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from PIL import Image

Row = dict[str, Any]


def bad(name: str, command: str | list[str], says: str, files: Mapping[str, bytes] | None = None, **more: Any) -> Row:
    """What is typed, what the line must say, what lies there beforehand; `more` as in the Row of conftest.py."""
    return {"name": name, "command": command, "says": says, "files": files or {}, **more}


def option_rows() -> list[Row]:
    """Numbers, texts and combinations."""
    values: list[tuple[str, str]] = [
        ("--steps 0", "--steps is 0; a whole number in 1 .. 500"),
        ("--steps 501", "--steps is 501"),
        ("--steps -3", "--steps is -3"),
        ("--steps 1.5", "'1.5' is not a whole number"),
        ("--steps ten", "'ten' is not a whole number"),
        ("--steps ''", "'' is not a whole number"),
        ("--steps 99999999999999999999999999", "not a whole number"),
        ("--steps \u0663", "not a whole number"),
        ("--skip -1", "--skip is -1"),
        ("--steps 20 --skip 20", r"--skip is 20; a whole number in 0 \.\. 19"),
        ("--skip 50", "skip"),
        ("--eta 1.01", "--eta is 1.01"),
        ("--solver ddim", "invalid choice: 'ddim'"),
        ("--solver dpm++ --eta 0.5", r"--solver dpm\+\+ is defined for --eta 1 alone, and it is 0.5"),
        ("--eta -0.1", "--eta is -0.1"),
        ("--eta nan", "'nan' is not a number"),
        ("--guidance-scale inf", "'inf' is not a number"),
        ("--guidance-scale 1e9", "--guidance-scale is 1000000000.0"),
        ("--guidance-scale 1e999", "--guidance-scale is inf"),
        ("--guidance-scale=-1e3", "--guidance-scale is -1000"),
        ("--guidance-scale -1e3", "expected one argument"),
        ("--source-guidance-scale -1", "--source-guidance-scale is -1"),
        ("--momentum-scale 1", "--momentum-scale is 1"),
        ("--momentum-beta 1.5", "--momentum-beta is 1.5"),
        ("--seed -1", "--seed is -1"),
        ("--seed 9223372036854775808", "--seed is 9223372036854775808"),
        ("--seed 18446744073709551616", "--seed is 18446744073709551616"),
        ("--seed 1.5", "not a whole number"),
        ("--size 0", "size 0"),
        ("--size 8", "too small"),
        ("--size 99999", "size 99999"),
        ("--size 64x0", "size 64 x 0"),
        ("--size 64*64", "neither a longer side"),
        ("--size -64", "neither a longer side|expected one argument"),
        ("--device cuda:99", "cuda:99.*not available|cuda:99.*use"),
        ("--device potato", "potato"),
        ("--dtype int8", "int8"),
        ("--prediction-type x", "'x'"),
        ("--output-size large", "'large'"),
        ("--add 'cat:scal=3'", "'scal=3' is no concept option; they are scale, threshold"),
        ("--add 'cat:scale=x'", "scale in 'cat:scale=x': 'x' is not a number"),
        ("--add 'cat:scale='", "'' is not a number"),
        ("--add 'cat:scale=3,'", "no concept option"),
        ("--add 'cat:scale=3,wamrup=2'", "'wamrup=2' is no concept option"),
        ("--add 'cat:scale=3,scale=4'", "scale is given twice"),
        ("--add 'cat:scale=1e4'", "--add 'cat': scale is 10000.0"),
        ("--add 'cat:scale=-3'", "scale is -3.0"),
        ("--add 'cat:threshold=1.5'", "--add 'cat': threshold is 1.5"),
        ("--add 'cat:warmup=-1'", "warmup is -1"),
        ("--add 'cat:warmup=1.5'", "warmup in .*not a whole number"),
        ("--add 'cat:weight=nan'", "not a number"),
        ("--add ':scale=3'", "names no concept"),
        ("--add ''", "names no concept"),
        ("--remove '  '", "names no concept"),
        ("--add", "expected one argument"),
        ("--add beard --ad hat", "unrecognized arguments: --ad hat"),
        ("--add zeppelin", "does not know 'zeppelin'; it knows"),
        ("--target 'a zeppelin'", "zeppelin"),
        ("--negative zeppelin", "zeppelin"),
        ("--source zeppelin", "zeppelin"),
        ("--masks m.png", "--masks shows where concepts acted"),
        ("--p2p --target hat", "pass --source, the picture as it is"),
        ("--p2p --source hat", "pass --target, the new picture"),
        ("--p2p cros=0.5 --source hat --target beard", "'cros=0.5' is not cross=N, self=N, reweight=WORD:N"),
        ("--p2p self=1,self=1", "'self=1' is not cross=N, self=N, .*, each once"),
        ("--p2p cross=2 --source hat --target beard", "cross is 2.0"),
        ("--p2p reweight=hat", "'reweight=hat' is not reweight=WORD:N"),
        ("--p2p reweight=hat:99 --source hat --target hat", "--p2p reweight of 'hat' is 99"),
        ("--p2p reweight=beard:2 --source hat --target hat", "'beard' is not in the target prompt"),
        ("--p2p blend= --source hat --target beard", "'blend=' is not blend=WORD, each word once"),
        ("--p2p blend=hat,blend=hat --source hat --target beard", "'blend=hat' is not blend=WORD, each word once"),
        ("--p2p blend=smile --source hat --target beard", "blend names 'smile', which is neither in the source prompt"),
        ("--p2p blend=hat,blend_threshold=2 --source hat --target beard", "--p2p blend_threshold is 2.0"),
        ("--p2p blend_threshold=0.5 --source hat --target beard", "blend_threshold has no effect without blend=WORD"),
        ("--blend hat", "it belongs to Prompt-to-Prompt: --p2p blend=hat"),
        ("--add hat:mask=words", "mask in 'hat:mask=words': 'words' is none of percentile, noise, attention, both"),
        ("--add hat --mask words", "'words' is none of percentile, noise, attention, both"),
        ("--mask both --target hat", "--mask is of concepts, and there is none"),
        ("--mask both --add hat:mask=noise", "--mask has no effect: every concept sets its own"),
        ("--only-where p.png --target hat", "--only-where is of concepts, and there is none"),
        ("--only-where no.png --add hat", "'no.png' does not exist"),
        ("--only-where p.png --add hat", "mask has colours; a grey picture is wanted"),
        ("--preset quick --add hat", "invalid choice: 'quick'"),
        ("--preset fast --model x.safetensors --add hat", "--preset fast was measured on the embedded model alone"),
        ("--preset leditspp --eta 0.5 --add hat", "--preset leditspp takes the solver dpm.., for --eta 1 alone"),
        ("--p2p q.png", "'q.png' is not cross=N, .*a picture comes before --p2p"),
        ("q.png", "unrecognized arguments: q.png"),
        ("--scale 3", r'--scale 3 \(it belongs to a concept: --add "hat:scale=3" \(`ledits edit --help`\)'),
        ("--threshold=0.9", 'it belongs to a concept: --add "hat:threshold=0.9"'),
        ("--cross 0.6", "it belongs to Prompt-to-Prompt: --p2p cross=0.6"),
        ("--guidance-scal 3", r"\(did you mean --guidance-scale\?\)"),
        ("--prompt hat", "the new picture is described with --target"),
    ]
    return [
        *(bad(f"option: {options}", f"edit p.png {options}", says) for options, says in values),
        bad("option: bytes that are not UTF-8", ["edit", "p.png", "--add", os.fsdecode(b"\xff")], "not UTF-8"),
        bad("option: steps in a process", "edit p.png --steps 0", "--steps is 0", process=True),
        bad("option: unknown in a process", "edit p.png --stepz 3", "unrecognized arguments: --stepz 3", process=True),
        bad("option: misspelt concept in a process", "edit p.png --add cat:scal=3", "'scal=3'", process=True),
        bad("option: no command", "", "COMMAND", process=True),
        bad("option: word in a process", "edit p.png --add zeppelin", "does not know 'zeppelin'", process=True),
        bad("option: unknown command", "edti p.png", "edti"),
        bad("option: no picture", "edit", "IMAGE"),
        bad("option: invert without a name", "invert p.png", "-o"),
        bad("option: invert with an edit", "invert p.png -o i.safetensors --add hat", "--add"),
        bad("option: inspect nothing", "inspect", "CHECKPOINT"),
    ]  # fmt: skip


def output_rows() -> list[Row]:
    """Names that cannot be written; found out before any work."""

    def linked(workshop: Any) -> None:
        (workshop.place / "same.png").hardlink_to(workshop.place / "p.png")

    there = {"o.png": b"precious", "p.ledits.png": b"precious", "r.json": b"{}"}
    return [
        bad("output: exists", "edit p.png -o o.png", "exists already; pass --overwrite", there, process=True),
        bad("output: the default exists", "edit p.png", "p.ledits.png' exists already", there),
        bad("output: report exists", "edit p.png -o n.png --report r.json", "--report 'r.json' exists", there),
        bad("output: unknown ending", "edit p.png -o o.gif", r"must end in \.png"),
        bad("output: no ending", "edit p.png -o o", "must end in"),
        bad("output: dash", "edit p.png -o -", "must end in|expected one argument"),
        bad("output: empty", "edit p.png -o ''", "must end in"),
        bad("output: no such folder", "edit p.png -o no/o.png", "folder .*no' does not exist", process=True),
        bad("output: folder is a file", "edit p.png -o p.png/o.png", "not a folder|not a directory|Not a directory"),
        bad("output: is a folder", "edit p.png -o o.png", "is a folder", make=lambda w: (w.place / "o.png").mkdir()),
        bad("output: is a pipe", "edit p.png -o o.png --overwrite", "not a regular file",
            make=lambda w: os.mkfifo(w.place / "o.png")),
        bad("output: too long", ["edit", "p.png", "-o", f"{'a' * 300}.png"], "too long"),
        bad("output: default too long", ["edit", f"{'a' * 250}.png"], "too long.*-o",
            make=lambda w: shutil.copy(w.place / "p.png", w.place / f"{'a' * 250}.png")),
        bad("output: a link to nothing", "edit p.png -o o.png --overwrite", "link to a file that does not exist",
            make=lambda w: (w.place / "o.png").symlink_to("gone.png")),
        bad("output: a link to a device", "edit p.png -o o.png --overwrite", "not a regular file",
            make=lambda w: (w.place / "o.png").symlink_to("/dev/null")),
        bad("output: null byte", ["edit", "p.png", "-o", "a\0b.png"], "null byte"),
        bad("output: the input", "edit p.png -o p.png --overwrite", "is an input of this run"),
        bad("output: the input mask", "edit p.png --add hat --only-where m.png -o m.png --overwrite", "is an input of",
            make=lambda w: Image.new("L", (64, 64), 255).save(w.place / "m.png")),
        bad("output: the input embedding", "invert p.png --embedding e.safetensors -o e.safetensors --overwrite",
            "is an input of this run", {"e.safetensors": b"x"}),
        bad("output: the input by another name", "edit p.png -o ./same.png --overwrite", "is an input", make=linked),
        bad("output: twice", "edit p.png -o o.png --add hat --masks ./o.png", "also the name given with -o"),
        bad("output: masks ending", "edit p.png --add hat --masks m.txt", "--masks 'm.txt' must end in"),
        bad("output: report ending", "edit p.png --report r.txt", r"must end in \.json"),
        bad("output: inversion ending", "edit p.png --save-inversion i.pt", r"must end in \.safetensors"),
        bad("output: invert ending", "invert p.png -o i.png", r"must end in \.safetensors"),
        bad("output: invert over a file", "invert p.png -o i.safetensors", "exists already", {"i.safetensors": b"x"}),
        bad("output: too wide for webp", "edit w.png -o o.webp", "16383 pixels per side",
            make=lambda w: Image.new("RGB", (16_400, 2_100)).save(w.place / "w.png")),
    ]  # fmt: skip


ROWS = option_rows() + output_rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_ends_in_one_line(row: Row, refused: Callable[[Row], None]) -> None:
    refused(row)


def test_a_folder_without_the_right_to_write(refused: Callable[[Row], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    refused(bad("output: read-only folder", "edit p.png -o o.png", "cannot be written to; choose another"))


@pytest.mark.parametrize("row", [row for row in ROWS if row.get("process")], ids=lambda row: row["name"])
def test_ends_a_process_in_one_line(row: Row, refused_process: Callable[[Row], None]) -> None:
    refused_process(row)


def test_there_are_rows_enough() -> None:
    assert len(ROWS) >= 90
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    assert sum(bool(row.get("process")) for row in ROWS) >= 6

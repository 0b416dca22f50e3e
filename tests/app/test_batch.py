"""`ledits batch`: killed and resumed to the bytes of an undisturbed run, whatever single jobs are made of."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ledits_min import InputError, LEdits
from ledits_min.app.batch import run as batch
from ledits_min.app.batch.folder import found_at, held
from ledits_min.app.batch.jobs import Job
from ledits_min.app.cli import main

SAMPLES = Path(__file__).resolve().parents[2] / "weights/tiny/samples"
FAST = ["--steps", "4", "--skip", "1", "--batch-size", "4"]
Lines = list[dict[str, Any]]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def errors(folder: Path) -> Lines:
    file = folder / "errors.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(*argv: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ledits_min.app.cli", "batch", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number rounds differently
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.01)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the sample portraits."""
    for sample in SAMPLES.iterdir():
        shutil.copy(sample, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_killed_twice_and_resumed_to_the_same_bytes(
    poisoned_table: Callable[[Path, int, int], dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 portraits, four of them poisoned, at 10 steps."""
    wanted = poisoned_table(tmp_path, 24, 4)
    argv = [tmp_path / "jobs.jsonl", "--steps", "10", "--batch-size", "5"]
    assert main(["batch", *map(str, argv), "-o", str(tmp_path / "whole")]) == 1
    assert f"{len(wanted)} of 24 jobs failed" in capsys.readouterr().err

    folder = tmp_path / "resumed"
    found: list[int] = []
    for _ in range(2):
        before = len(list(folder.glob("*.png")))
        process = start(*argv, "-o", folder)
        wait_for(lambda: len(list(folder.glob("*.png"))) > before, process)  # noqa: B023
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        found.append(len(list(folder.glob("*.png"))))
    assert 0 < found[0] < found[1] < 20
    (folder / ".ledits-0123456789ab.tmp").write_bytes(b"what a killed run was writing")
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert main(["batch", *map(str, argv), "-o", str(folder)]) == 1
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())  # nothing is done twice
    assert contents(folder) == contents(tmp_path / "whole")
    assert len(list(folder.glob("*.png"))) == 20
    reasons = {entry["image"]: entry["reason"] for entry in errors(folder)}
    assert set(reasons) == set(wanted)
    assert all(wanted[image] in reason for image, reason in reasons.items()), reasons


def test_a_picture_is_what_edit_makes_of_it(place: Path) -> None:
    row = {"image": "portrait1.png", "add": "sunglasses", "remove": "hat", "seed": 3, "output": "b.png"}
    write_table(place / "t.jsonl", [row])
    assert main(["batch", "t.jsonl", "-o", "out", "--target", "a man", *FAST]) == 0
    words = ["--add", "sunglasses", "--remove", "hat", "--target", "a man", "--seed", "3", "-o", "e.png"]
    assert main(["edit", "portrait1.png", *words, "--steps", "4", "--skip", "1"]) == 0
    with Image.open("out/b.png") as one, Image.open("e.png") as other:
        assert one.tobytes() == other.tobytes()
        assert json.loads(one.info["ledits"]) == json.loads(other.info["ledits"])
    assert not (place / "out/errors.jsonl").exists()


def test_a_mask_that_changes_during_the_run_is_not_that_of_the_plan(place: Path) -> None:
    picture, mask = place / "portrait1.png", place / "mask.png"
    Image.new("L", (64, 64), 255).save(mask)
    job = Job(1, picture.name, picture, "o.png", {"only_where": str(mask)})
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (picture, mask)]
    task = batch.Task(job, digests[0], {"only_where": digests[1]})
    assert batch._decoded(task).size == Image.open(picture).size
    Image.new("L", (64, 64), 128).save(mask)
    with pytest.raises(InputError, match="mask.png' was changed during the run; run it again"):
        batch._decoded(task)


def test_a_mask_is_no_place_for_an_output(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(place / "t.jsonl", [{"image": "portrait1.png", "output": "m.png", "only_where": "m.png"}])
    mask = Image.new("L", (64, 64), 255)
    mask.save("m.png")
    before = Path("m.png").read_bytes()
    assert main(["batch", str(table), "-o", ".", "--add", "hat", "--overwrite"]) == 2
    assert "'m.png' there is an input of this run" in capsys.readouterr().err
    assert Path("m.png").read_bytes() == before


@pytest.mark.parametrize(("options", "says"), [
    (["--mask", "both"], "--mask is of concepts, and there is none"),
    (["--only-where", "portrait1.png"], "--only-where is of concepts, and there is none"),
    (["--add", "hat", "--only-where", "none.png"], "'none.png' does not exist"),
])  # fmt: skip
def test_a_mask_for_nothing_is_refused_at_once(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["batch", ".", "-o", "out", *options]) == 2
    assert says in capsys.readouterr().err
    assert not (place / "out").exists()


def test_only_what_changed_is_done_again(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Lines = [{"image": f"portrait{i}.png", "add": "hat"} for i in range(1, 7)]
    write_table(place / "t.jsonl", rows)
    argv = ["batch", "t.jsonl", "-o", "out", *FAST]

    def done() -> set[str]:
        before = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
        assert main(argv) == 0
        return {path.name for path in Path("out").glob("*.png") if before.get(path.name) != path.stat().st_mtime_ns}

    assert len(done()) == 6
    whole = contents(place / "out")
    assert done() == set()
    assert "wrote 0 pictures to 'out'" in capsys.readouterr().out
    shutil.copy("portrait1.png", "portrait2.png")  # the picture itself
    rows[3]["seed"] = 1
    rows[4]["add"] = "beard"
    write_table(place / "t.jsonl", rows)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said == (
        "ledits: error: -o 'out': 'portrait2.png' and 2 more there are of other pictures or settings; pass --overwrite "
        "to make them anew, or name another folder\n"
    )
    assert contents(place / "out") == whole
    argv += ["--overwrite"]
    assert done() == {"portrait2.png", "portrait4.png", "portrait5.png"}
    third = Path("out/portrait3.png")
    third.write_bytes(third.read_bytes()[:-20])  # cut short
    Path("out/portrait6.png").write_bytes(b"")
    assert done() == {"portrait3.png", "portrait6.png"}
    assert contents(place / "out")["portrait3.png"] == whole["portrait3.png"]  # its batch is as large as it was
    argv += ["--dtype", "float32"]
    assert len(done()) == (6 if LEdits.from_pretrained().dtype.itemsize == 2 else 0)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    argv += ["--compile"]  # rounds differently
    assert len(done()) == 6


def test_pictures_of_many_sizes(place: Path) -> None:
    """Only what shares its latents shares a batch, and the result has the picture's own size."""
    with Image.open("portrait1.png") as picture:
        for i, size in enumerate([(128, 128), (160, 128), (128, 160), (320, 256), (90, 90)]):
            picture.resize(size).save(f"s{i}.png")
        turned = Image.Exif()
        turned[0x0112] = 6
        picture.resize((160, 128)).save("s5.jpg", exif=turned)
    write_table(place / "t.jsonl", [{"image": path.name} for path in sorted(place.glob("s*.*"))])
    assert main(["batch", "t.jsonl", "-o", "out", "--add", "hat", *FAST]) == 0
    sizes = [Image.open(f"out/s{i}.png").size for i in range(6)]
    assert sizes == [(128, 128), (160, 128), (128, 160), (320, 256), (90, 90), (128, 160)]


def test_a_failure_inside_a_batch_is_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong with one picture among others, in the middle of the work."""
    plain = LEdits.invert_and_edit

    def fail(self: LEdits, image: Any, **options: Any) -> Any:
        if 4 in options["seed"]:
            raise ZeroDivisionError("four")
        return plain(self, image, **options)

    monkeypatch.setattr(LEdits, "invert_and_edit", fail)
    write_table(place / "t.jsonl", [{"image": f"portrait{i}.png", "seed": i} for i in range(1, 7)])
    assert main(["batch", "t.jsonl", "-o", "out", "--add", "hat", *FAST]) == 1
    assert len(list(Path("out").glob("*.png"))) == 5
    (entry,) = errors(place / "out")
    assert (entry["line"], entry["image"], entry["output"]) == (4, "portrait4.png", "portrait4.png")
    assert entry["reason"].startswith("ZeroDivisionError: four")
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main(["batch", "t.jsonl", "-o", "out", "--add", "hat", *FAST]) == 0
    assert not Path("out/errors.jsonl").exists()


def test_what_is_in_the_way(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of somebody else stays, unless --overwrite; a folder stays."""
    Path("out").mkdir()
    shutil.copy("portrait6.png", "out/portrait1.png")
    Path("out/portrait2.png").mkdir()
    write_table(place / "t.jsonl", [{"image": f"portrait{i}.png"} for i in (1, 2, 3)])
    argv = ["batch", "t.jsonl", "-o", "out", "--add", "hat", *FAST]
    assert main(argv) == 1
    assert "2 of 3 jobs failed; 'out/errors.jsonl' says why" in capsys.readouterr().err
    assert ["no output of a batch" in entry["reason"] for entry in errors(place / "out")] == [True, False]
    assert Path("out/portrait1.png").read_bytes() == Path("portrait6.png").read_bytes()
    assert main([*argv, "--overwrite"]) == 1
    assert [entry["line"] for entry in errors(place / "out")] == [2]


def test_a_full_disk_ends_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(image: Any, path: Path, metadata: Any, through_links: bool) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(batch, "save_image", full)
    write_table(place / "t.jsonl", [{"image": "portrait1.png"}])
    assert main(["batch", "t.jsonl", "-o", "out", "--add", "hat", *FAST]) == 1
    assert "ledits: error: the disk is full ('out/portrait1.png')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nothing.jsonl", "-o", "out"], "'nothing.jsonl' does not exist"),
        (["t.jsonl", "-o", "portrait1.png"], "-o 'portrait1.png' cannot be used: it is not a folder"),
        (["t.jsonl", "-o", "."], "-o '.': 'portrait1.png' there is an input of this run"),
        (["t.jsonl", "-o", "out", "--batch-size", "0"], "--batch-size is 0; a whole number in 1"),
        (["t.jsonl", "-o", "out", "--workers", "2"], "--workers belongs to --engine ray"),
        (["t.jsonl", "-o", "out", "--eta", "2"], "--eta is 2.0; a number in 0 .. 1"),
        (["t.jsonl"], "-o"),
        (["twice.jsonl", "-o", "out"], "would both write 'portrait1.png'"),
    ],
)
def test_refused_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:  # fmt: skip
    write_table(place / "t.jsonl", [{"image": "portrait1.png"}])
    write_table(place / "twice.jsonl", [{"image": "portrait1.png"}] * 2)
    before = contents(place)
    assert main(["batch", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ledits: error: ") and says in line
    assert contents(place) == before


def test_a_signal_leaves_whole_pictures(place: Path) -> None:
    write_table(place / "t.jsonl", [{"image": f"portrait{1 + i % 6}.png", "output": f"{i}.png"} for i in range(60)])
    process = start("t.jsonl", "-o", "out", "--add", "hat", *FAST)
    wait_for(lambda: len(list(Path("out").glob("*.png"))) > 3, process)
    process.terminate()
    said = process.communicate()[1]
    assert (process.returncode, said) == (143, "ledits: error: terminated\n")
    found = list(Path("out").iterdir())
    assert 3 < len(found) < 60
    assert all(hash_of(path) for path in found)


def test_a_folder_that_another_run_writes_to(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    with held(Path("out")):
        assert main(["batch", ".", "-o", "out", "--add", "hat", *FAST]) == 2
    assert "-o 'out': another batch is writing there" in capsys.readouterr().err


def hash_of(path: Path) -> str | None:
    """Of a batch's own picture, "" where it is not whole; None for anything else."""
    found = found_at(path)
    return found.hash if found is not None and found.ours else None


def test_a_damaged_picture_is_not_finished(place: Path) -> None:
    write_table(place / "t.jsonl", [{"image": "portrait1.png"}])
    assert main(["batch", "t.jsonl", "-o", "out", "--add", "hat", *FAST]) == 0
    path = Path("out/portrait1.png")
    content = path.read_bytes()
    assert hash_of(path)
    for length in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert hash_of(path) == ""
    for length in (8, 40):  # before its mark: nobody knows whose it is
        path.write_bytes(content[:length])
        assert hash_of(path) is None
    path.write_bytes(content[:-60] + bytes([content[-60] ^ 1]) + content[-59:])
    assert hash_of(path) == ""
    assert hash_of(place / "portrait1.png") is None


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text": (lambda path: path.write_text("precious"), "exists and is no output of a batch"),
    "a picture": (lambda path: shutil.copy("portrait6.png", path), "exists and is no output of a batch"),
    "a link": (lambda path: path.symlink_to("../precious.txt"), "is a link"),
    "a link to nothing": (lambda path: path.symlink_to("../gone.txt"), "is a link"),
    "a link to a device": (lambda path: path.symlink_to("/dev/full"), "is a link"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_somebody_elses_stays(place: Path, kind: str) -> None:
    """Under an output's name; with --overwrite a link itself is replaced, and what it names stays."""
    make, says = FOREIGN[kind]
    Path("out").mkdir()
    Path("precious.txt").write_text("precious")
    path = Path("out/portrait1.png")
    make(path)
    before = os.lstat(path)
    write_table(place / "t.jsonl", [{"image": "portrait1.png"}, {"image": "portrait2.png"}])
    argv = ["batch", "t.jsonl", "-o", "out", "--add", "hat", *FAST]
    assert main(argv) == 1
    (entry,) = errors(place / "out")
    assert entry["line"] == 1 and says in entry["reason"] and "--overwrite" in entry["reason"]
    assert os.path.samestat(os.lstat(path), before)
    replaced = kind not in ("a pipe", "a folder")
    assert main([*argv, "--overwrite"]) == int(not replaced)
    assert bool(hash_of(path)) == replaced
    assert Path("precious.txt").read_text() == "precious" and not Path("gone.txt").exists()
    assert not path.is_symlink()


@pytest.mark.parametrize("kind", ["a text", "of other lines", "empty", "a link", "a pipe", "the table itself"])
def test_an_errors_file_of_somebody_else_stays(place: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    Path("out").mkdir()
    Path("precious.txt").write_text("precious")
    path, table = Path("out/errors.jsonl"), write_table(place / "t.jsonl", [{"image": "portrait1.png"}])
    if kind == "a link":
        path.symlink_to("../precious.txt")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "the table itself":
        table = write_table(path, [{"image": "../portrait1.png"}])
    else:
        path.write_text({"a text": "precious\n", "of other lines": '{"line": 3}\n', "empty": ""}[kind])
    before = os.lstat(path)
    assert main(["batch", str(table), "-o", "out", "--add", "hat", *FAST]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "errors.jsonl' is of no batch; move it away, or name another folder with -o" in line
    assert os.path.samestat(os.lstat(path), before) and os.listdir("out") == ["errors.jsonl"]
    assert Path("precious.txt").read_text() == "precious"


def test_what_another_process_is_writing_stays(place: Path) -> None:
    Path("out").mkdir()
    write_table(place / "t.jsonl", [{"image": "portrait1.png"}])
    with open("out/.ledits-alive.tmp", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["batch", "t.jsonl", "-o", "out", "--add", "hat", *FAST]) == 0
    assert sorted(os.listdir("out")) == [".ledits-alive.tmp", "portrait1.png"]

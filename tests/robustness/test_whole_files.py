"""Killed, interrupted, out of room, two at once: every file is whole, and one clear line says what happened."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ledits_min.app.cli import main

SAMPLE = Path(__file__).resolve().parents[2] / "weights/tiny/samples/portrait1.png"
FAST = ["--steps", "10", "--skip", "3"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # the scripts fork, which a pool of threads does not survive

# Forks a child that saves, kills it, looks. Every other kill waits until the write itself has begun.
KILLED = """
import os, random, signal, sys, time
import numpy as np, torch
from PIL import Image
from ledits_min.files.inversion import Inversion
from ledits_min.inversion import InversionSettings
from ledits_min.config import ScheduleConfig
from ledits_min.files import inversion as archive
from ledits_min.files import write
from ledits_min.files.write import save_image

# What atomic_write is there to prevent: the file itself, written bit by bit.
def careless(path, content, through_links=True):
    with open(path, "wb", buffering=0) as file:
        for i in range(0, len(content), len(content) // 50):
            file.write(content[i : i + len(content) // 50])
            time.sleep(1e-3)

if sys.argv[2] == "careless":
    archive.atomic_write = write.atomic_write = careless

def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (300, 300, 3), dtype=np.uint8))

def inversion(seed):
    x = torch.randn(60, 1, 4, 64, 64, generator=torch.Generator().manual_seed(seed))
    settings = InversionSettings("model", ScheduleConfig(), 60, 0, 1.0, "", 3.5, (seed,))
    return Inversion(x[0].clone(), x, x[1].clone(), (torch.zeros(64, 64, 3, dtype=torch.uint8),), settings)

if sys.argv[1] == "result":
    path, things, save = "o.png", [picture(0), picture(1)], lambda thing: save_image(thing, path)
else:
    path, things, save = "o.safetensors", [inversion(0), inversion(1)], lambda thing: thing.save(path)
whole = []
for thing in things:
    began = time.perf_counter()
    save(thing)
    seconds = time.perf_counter() - began
    whole.append(open(path, "rb").read())
rng, found = random.Random(0), {"old": 0, "new": 0, "none": 0, "broken": 0, "left": 0}
for trial in range(50):
    for name in os.listdir("."):
        os.unlink(name)
    if trial % 4:
        open(path, "wb").write(whole[0])
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, b"x")
        save(things[1])
        os._exit(0)
    os.read(ready, 1)
    if trial % 2:
        while not any(name.endswith(".tmp") for name in os.listdir(".")) and os.waitpid(child, os.WNOHANG)[0] == 0:
            pass
        time.sleep(rng.random() * 0.2 * seconds)
    else:
        time.sleep(rng.random() * seconds)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    os.close(ready), os.close(told)
    content = open(path, "rb").read() if os.path.exists(path) else None
    what = {None: "none", whole[0]: "old", whole[1]: "new"}.get(content, "broken")
    found[what if what != "none" or trial % 4 == 0 else "broken"] += 1
    rest = [name for name in os.listdir(".") if name != path]
    assert all(name.startswith(".ledits-") and name.endswith(".tmp") for name in rest), rest
    found["left"] += len(rest)
    save(things[1])  # what is left of the dead does not disturb the living
    assert open(path, "rb").read() == whole[1]
import json
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["result", "inversion"])
def test_killed_at_fifty_moments_of_a_save(tmp_path: Path, kind: str) -> None:
    found = fifty_kills(kind, "atomic", tmp_path)
    print(f"50 kills while saving {kind}: {found}")
    assert found["broken"] == 0
    assert found["old"] + found["new"] + found["none"] == 50
    assert found["left"] > 0  # some kills did hit the write, so the test can fail


@pytest.mark.parametrize("kind", ["result", "inversion"])
def test_the_kills_find_a_writer_that_is_not_atomic(tmp_path: Path, kind: str) -> None:
    found = fifty_kills(kind, "careless", tmp_path)
    assert found["broken"] >= 5 and found["left"] == 0


def fifty_kills(kind: str, writer: str, folder: Path) -> dict[str, int]:
    """What each kill left under the final name: the old file, the new one, none where there was none, or broken."""
    command = [sys.executable, "-c", KILLED, kind, writer]
    finished = subprocess.run(command, cwd=folder, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found: dict[str, int] = json.loads(finished.stdout)
    return found


# Forks the whole command, signals it at a random moment of its work, and reports exit code, stderr and files.
SIGNALLED = """
import io, json, os, random, signal, sys, time
from contextlib import redirect_stdout
from ledits_min.app.cli import main

def run(argv):
    with redirect_stdout(io.StringIO()):
        return main(argv)

argv = sys.argv[1:]
for lazily_imported in (True, False):
    began = time.perf_counter()
    assert run(argv if lazily_imported else [*argv, "--overwrite"]) == 0
    seconds = time.perf_counter() - began
whole = {name: open(name, "rb").read() for name in os.listdir(".") if not name.endswith(".json")}
rng, trials = random.Random(0), []
for trial in range(14):
    for name in os.listdir("."):
        if name != "p.png":
            os.unlink(name)
    number = (signal.SIGINT, signal.SIGTERM)[trial % 2]
    error, told = os.pipe()
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(told, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        plain = time.perf_counter
        def first():  # main has begun, its handlers stand
            time.perf_counter = plain
            os.write(go, b"x")
            return plain()
        time.perf_counter = first
        os._exit(run(argv))
    os.close(told), os.read(ready, 1)
    time.sleep(rng.random() * seconds)
    for again in range(3 if trial % 3 == 0 else 1):  # people press it more than once
        os.kill(child, number)
        time.sleep(0.001)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = os.read(error, 10_000).decode()
    os.close(error), os.close(ready), os.close(go)
    files = os.listdir(".")
    broken = [name for name in files if name in whole and open(name, "rb").read() != whole[name]]
    trials.append({"signal": number.name, "status": status, "said": said, "broken": broken,
                   "strange": [name for name in files if name not in whole and name != "r.json"]})
print(json.dumps(trials))
"""


def test_signalled_at_random_moments_of_an_edit(tmp_path: Path) -> None:
    shutil.copy(SAMPLE, tmp_path / "p.png")
    written = ["-o", "o.png", "--masks", "m.png", "--save-inversion", "i.safetensors", "--report", "r.json"]
    command = [sys.executable, "-c", SIGNALLED, "edit", "p.png", "--add", "hat", *FAST, *written]
    finished = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    trials = json.loads(finished.stdout)
    ended = {"SIGINT": (130, "ledits: error: interrupted\n"), "SIGTERM": (143, "ledits: error: terminated\n")}
    for trial in trials:
        assert trial["broken"] == trial["strange"] == [], trial
        if trial["status"] != 0:  # it may have been through
            assert (trial["status"], trial["said"]) == ended[trial["signal"]]
    assert sum(trial["status"] != 0 for trial in trials) >= 7


INTERRUPTED_IMPORT = """
import builtins, os, signal, sys
from ledits_min.app.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background passes Ctrl-C on as ignored
plain, count, wanted = builtins.__import__, 0, int(sys.argv[1])
def counting(*arguments, **named):
    global count
    count += 1
    if count == wanted:
        builtins.__import__ = plain
        os.kill(os.getpid(), signal.SIGINT)
    return plain(*arguments, **named)
builtins.__import__ = counting
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [300, 5000])
def test_interrupted_while_it_imports(tmp_path: Path, number: int) -> None:
    """Most of a short run is the import of torch."""
    shutil.copy(SAMPLE, tmp_path / "p.png")
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, str(number), "edit", "p.png", "--add", "hat"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (130, "ledits: error: interrupted\n")
    assert os.listdir(tmp_path) == ["p.png"]


@pytest.mark.parametrize(("room", "name", "options"), [
    ("4k", "o.png", ["-o", "disk/o.png"]),
    ("16k", "i.safetensors", ["-o", "disk/o.png", "--save-inversion", "disk/i.safetensors"]),
    ("4k", "r.json", ["-o", "o.png", "--report", "disk/r.json", "--steps", "40"]),
    ("4k", "m.png", ["-o", "o.png", "--masks", "disk/m.png"]),
], ids=["picture", "inversion", "report", "masks"])  # fmt: skip
def test_a_full_disk_is_one_line(tmp_path: Path, room: str, name: str, options: list[str]) -> None:
    """A real one: a file system in memory that is too small for a file, in a name space of its own."""
    shutil.copy(SAMPLE, tmp_path / "p.png")
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size={room} none disk"
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*own, mount], cwd=tmp_path, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here; the test below stands in for it")
    argv = ["edit", "p.png", "--add", "hat", *FAST, *options]
    run = f'{mount} && "$@"; code=$?; echo "left: $(ls -A disk)"; exit $code'
    command = [*own, run, "sh", sys.executable, "-m", "ledits_min.app.cli", *argv]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    assert finished.stderr.startswith("ledits: error: the disk is full ('")
    assert f"disk/{name}')" in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == "left: \n"
    assert sorted(os.listdir(tmp_path)) == ["disk", "p.png"]


@pytest.mark.parametrize("step", ["ledits_min.files.write.open", "os.fsync", "os.replace"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_step_of_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str, fault: int
) -> None:
    shutil.copy(SAMPLE, tmp_path / "p.png")
    (tmp_path / "o.png").write_bytes(b"precious")
    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(step, fail, raising=False)
    assert main(["edit", "p.png", "--add", "hat", "--steps", "3", "--skip", "1", "-o", "o.png", "--overwrite"]) == 1
    monkeypatch.undo()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("ledits: error: ")
    assert "o.png'" in lines[-1]
    assert ("the disk is full" in lines[-1]) == (fault != errno.EIO)
    assert sorted(os.listdir(tmp_path)) == ["o.png", "p.png"]
    assert (tmp_path / "o.png").read_bytes() == b"precious"


WRITERS = """
import os
from pathlib import Path
from ledits_min.files.write import atomic_write
contents = [bytes([65 + i]) * (100_000 + i) for i in range(4)]
atomic_write("o.bin", contents[0])
children = []
for content in contents:
    child = os.fork()
    if child == 0:
        for _ in range(25):
            atomic_write("o.bin", content)
        os._exit(0)
    children.append(child)
seen = 0
while children:
    assert Path("o.bin").read_bytes() in contents
    seen += 1
    children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
assert os.listdir(".") == ["o.bin"], os.listdir(".")
"""


def test_four_processes_write_the_same_file(tmp_path: Path) -> None:
    """A reader sees a whole file at any time."""
    command = [sys.executable, "-c", WRITERS]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_two_commands_side_by_side_write_the_same_bytes(tmp_path: Path) -> None:
    """At the same time, in one folder, with other hash seeds: pictures, inversions and reports agree."""
    shutil.copy(SAMPLE, tmp_path / "p.png")
    runs = []
    for name in "ab":
        argv = ["edit", "p.png", "--add", "hat", "--remove", "beard", *FAST, "-o", f"{name}.png"]
        argv += ["--save-inversion", f"{name}.safetensors", "--report", f"{name}.json"]
        command = [sys.executable, "-m", "ledits_min.app.cli", *argv]
        environment = {**os.environ, "PYTHONHASHSEED": str(ord(name))}
        runs.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
    said = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]
    for suffix in ("png", "safetensors"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    Image.open(tmp_path / "a.png").load()
    assert len(os.listdir(tmp_path)) == 7

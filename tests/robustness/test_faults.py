"""Killed, interrupted, out of room, out of memory, not a number, two at once: every file whole, and one clear line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ledits_min import LEdits, pipeline
from ledits_min.app.cli import main
from ledits_min.config import EditDefaults
from ledits_min.engine.budget import inverting_and_editing
from ledits_min.engine.fast_networks import FastUNet
from ledits_min.engine.plan import editing_phase, inversion_phase
from ledits_min.files import inversion as archive
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings
from ledits_min.p2p import Lending, token_mapper
from ledits_min.sega import Concept
from ledits_min.text import TextEncoder
from ledits_min.vae import VAE

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


# --- in the middle of the work ---------------------------------------------------------------------------------------

SHORT = ["--steps", "4", "--skip", "1", "--source", "a portrait", "--dtype", "float32", "--overwrite"]
CONCEPTS = ["--target", "short hair", "--add", "hat:warmup=0", "--remove", "beard:warmup=1"]
KEPT = ["--save-inversion", "i.safetensors"]  # then inversion and edit run one after the other
WAYS = {
    "in one pass": CONCEPTS,
    "one after the other": [*CONCEPTS, *KEPT],
    "prompt to prompt": ["--target", "a smile", "--p2p", *KEPT],
}
OUT_OF_MEMORY = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A portrait, and an earlier result that nothing may harm."""
    shutil.copy(SAMPLE, tmp_path / "p.png")
    (tmp_path / "o.png").write_bytes(b"precious")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit_says(capsys: pytest.CaptureFixture[str], code: int, *more: str) -> list[str]:
    """Run the edit; what it said, its last line being the only error, and nothing written, where it failed."""
    written = ["-o", "o.png", "--report", "r.json"]
    assert main(["edit", "p.png", *SHORT, *written, *more]) == code
    lines = capsys.readouterr().err.splitlines()
    if code:
        assert [line.startswith("ledits: error: ") for line in lines] == [False] * (len(lines) - 1) + [True], lines
        assert all(line.startswith("ledits: ") for line in lines), lines
        assert sorted(os.listdir(".")) == ["o.png", "p.png"] and Path("o.png").read_bytes() == b"precious"
    return lines


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, calls: int = 0) -> None:
    """What `owner` calls `name` works for so many `calls`, and raises from then on."""
    plain, left = getattr(owner, name), [calls]

    def failed(*positional: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return plain(*positional, **named)

    monkeypatch.setattr(owner, name, failed)


OF_A_PICTURE = "out of memory with one picture of 128 x 128 pixels"
PHASES: dict[str, tuple[Any, str, str]] = {
    "loading": (pipeline, "build_networks", "out of memory"),
    "encoding texts": (TextEncoder, "encode", "out of memory"),
    "encoding": (VAE, "encode", f"encoding: {OF_A_PICTURE}"),
    "inverting": (FastUNet, "forward", f"inverting: {OF_A_PICTURE}"),
    "decoding": (VAE, "decode", f"decoding: {OF_A_PICTURE}"),
    "laying the change": (pipeline, "lay_change", "out of memory"),
    "saving": (archive, "save", "out of memory"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("phase", PHASES)
def test_out_of_memory_in_each_phase(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, phase: str, error: BaseException
) -> None:
    owner, name, says = PHASES[phase]
    failing(monkeypatch, owner, name, error)
    line = edit_says(capsys, 1, *WAYS["one after the other"])[-1]
    assert line.startswith(f"ledits: error: {says}"), line


@pytest.mark.parametrize(
    ("way", "calls"), [("in one pass", 3), ("one after the other", 1 + 3), ("prompt to prompt", 1 + 3)]
)
def test_out_of_memory_at_each_call_of_the_unet(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, way: str, calls: int
) -> None:
    """From that call on for good, so that smaller batches do not help. Three steps; what inverts first is one call."""
    for call in range(calls + 1):
        with monkeypatch.context() as patch:
            failing(patch, FastUNet, "forward", OUT_OF_MEMORY[0], call)
            line = edit_says(capsys, int(call < calls), *WAYS[way])[-1:]
        phase = "inverting and editing" if way == "in one pass" else "editing" if call else "inverting"
        assert call == calls or line[0].startswith(f"ledits: error: {phase}: {OF_A_PICTURE}"), line


@pytest.mark.parametrize("way", ["in one pass", "one after the other"])
def test_not_a_number_at_every_step_and_branch(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """One number of one evaluation, in every evaluation of an edit in turn; the line names each of them once."""
    concepts = Concept("hat", warmup_steps=0), Concept("beard", warmup_steps=1)
    settings = EditSettings("short hair", concepts=tuple(concept.resolve(EditDefaults()) for concept in concepts))
    inversion = InversionSettings(num_steps=4, skip=1, source="a portrait")
    costs = LEdits.from_pretrained("tiny", device="cpu", dtype="float32").runner.costs((16, 16), torch.device("cpu"))
    phases = [inverting_and_editing(inversion, settings, 1, costs, torch.device("cpu"))]
    if way == "one after the other":
        phases = [inversion_phase(inversion, 1, 64), editing_phase("editing", inversion, settings, 1, 64)]
    wanted = [(phase.name, row.step, row.text) for phase in phases for row in phase.rows]
    found = []
    for number in range(len(wanted)):
        with monkeypatch.context() as patch:
            poison(patch, number)
            line = edit_says(capsys, 1, *WAYS[way])[-1]
        says = r"ledits: error: ([a-z ]+): the prediction for '(.*)' holds values that .* at step (\d) \(t"
        match = re.match(says, line)
        assert match is not None, line
        found.append((match[1], int(match[3]), match[2]))
    # Where the edit starts x_t is the inversion's, and so is what is predicted for the empty prompt.
    assert found == wanted and len(wanted) == 6 + 3 + 3 + 3 + 2 - (way == "in one pass")


def test_not_a_number_in_half_precision_is_repaired(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault happens once, as an overflow that float32 does not share; what is written is a picture, not black."""
    for number in range(0, 16, 3):
        with monkeypatch.context() as patch:
            poison(patch, number)
            said = "\n".join(edit_says(capsys, 0, *CONCEPTS, "--dtype", "bfloat16", "--size", "64"))
        assert said.count("in bfloat16; once more in float32") == 1, said
        assert np.asarray(Image.open("o.png")).mean() > 20


def test_not_a_number_with_prompt_to_prompt(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every evaluation of the edit in turn, the source's among them; the line names each of them once."""
    inversion, settings = InversionSettings(num_steps=4, skip=1, source="a portrait"), EditSettings("a smile")
    lending = Lending(token_mapper([(1,)], [(2,)], 5), cross_steps=3, self_steps=0, self_tokens=0)
    phase, before = editing_phase("editing", inversion, settings, 1, 64, lending), 3 * 2  # of the inversion
    found = []
    for number in range(phase.evaluations):
        with monkeypatch.context() as patch:
            poison(patch, before + number)
            line = edit_says(capsys, 1, *WAYS["prompt to prompt"])[-1]
        match = re.match(r"ledits: error: editing: the prediction for '(.*)' holds .* at step (\d) \(t", line)
        assert match is not None, line
        found.append((int(match[2]), match[1]))
    assert found == [(row.step, row.text) for row in phase.rows]
    assert found[:4] == [(0, "a portrait"), (0, "a smile"), (0, ""), (0, "")] and len(found) == 3 * 4


def poison(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """One value of the `number`-th evaluation of the UNet."""
    plain, done = FastUNet.forward, [0]

    def forward(self: FastUNet, x_t: Tensor, *more: Any, **named: Any) -> Tensor:
        eps: Tensor = plain(self, x_t, *more, **named)
        if 0 <= number - done[0] < len(eps):
            eps[number - done[0], 0, 0, 0] = torch.nan
        done[0] += len(eps)
        return eps

    monkeypatch.setattr(FastUNet, "forward", forward)

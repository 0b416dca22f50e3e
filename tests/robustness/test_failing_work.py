"""Out of memory and not a number, at every phase and evaluation: repaired, or one clear line and nothing written."""

from __future__ import annotations

import os
import re
import shutil
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

"""`ledits edit --explain` and what the report says of evaluations: the plan is what is then done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ledits_min.app.cli import main

SAMPLE = sorted((Path(__file__).parents[2] / "weights/tiny/samples").glob("*.png"))[0]
EDIT = [
    "edit",
    str(SAMPLE),
    "--steps",
    "6",
    "--skip",
    "2",
    "--add",
    "hat",
    "--source",
    "a portrait",
    "--dtype",
    "float32",
]


def test_it_tells_and_does_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ledits_min.engine.fast_networks.FastUNet.forward", None)
    assert main([*EDIT, "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("inverting and editing: 14 evaluations in 4 calls of at most 4") for line in lines)
    assert '  inverting, steps 0 to 3: 2 branches, "", "a portrait"' in lines
    assert '  editing, steps 1 to 3: 2 branches, "", "hat"' in lines
    assert main([*EDIT, "--explain", "--save-inversion", "x.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("inverting: 8 evaluations in 1 call of at most 8") for line in lines)
    assert any(line.startswith("editing: 7 evaluations in 4 calls of at most 2") for line in lines)
    assert '  steps 1 to 3: 2 branches, "", "hat"' in lines
    assert list(tmp_path.iterdir()) == []


def test_the_report_holds_the_plan_and_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report, saved = (tmp_path / name for name in ("x.png", "x.json", "x.safetensors"))
    assert main([*EDIT, "-o", str(tmp_path / "z.png"), "--report", str(report)]) == 0
    told = json.loads(report.read_text())["evaluations"]
    (name,) = told["planned"]["phases"]
    assert told["evaluated"] == {name: told["planned"]["phases"][name]["evaluations"]} == {"inverting and editing": 14}

    report.unlink()
    assert main([*EDIT, "-o", str(out), "--report", str(report), "--save-inversion", str(saved)]) == 0
    told = json.loads(report.read_text())["evaluations"]
    planned = {phase: told["planned"]["phases"][phase]["evaluations"] for phase in ("inverting", "editing")}
    assert told["evaluated"] == planned == {"inverting": 8, "editing": 7}

    again = ["edit", str(saved), "--add", "hat", "--dtype", "float32"]
    assert main([*again, "-o", str(tmp_path / "y.png"), "--report", str(report), "--overwrite"]) == 0
    told = json.loads(report.read_text())["evaluations"]
    assert told["evaluated"] == {"editing": 7}
    assert list(told["planned"]["phases"]) == ["editing"]
    capsys.readouterr()
    assert main([*again, "--explain"]) == 0
    assert "inverting" not in capsys.readouterr().out


@pytest.mark.parametrize(("blend", "of_source"), [("", 3), (",blend=beard", 4)])
def test_prompt_to_prompt_is_told_and_counted(
    blend: str, of_source: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cross-attention maps are lent in int(0.5 (6 + 1)) steps: there the source is asked about too, for both texts; to
    be blended with it is, in all steps.
    """
    asked = [*EDIT, "--target", "a portrait with a beard", "--p2p", f"cross=0.5,self=0.2{blend}"]
    assert main([*asked, "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = {"inverting": 2 * 4, "editing": 3 * 4 - 1 + 2 * of_source}
    for phase, evaluations in wanted.items():
        assert any(line.startswith(f"{phase}: {evaluations} evaluations in ") for line in lines), lines

    out, report, saved = (tmp_path / name for name in ("x.png", "x.json", "x.safetensors"))
    assert main([*asked, "-o", str(out), "--report", str(report), "--save-inversion", str(saved)]) == 0
    told = json.loads(report.read_text())["evaluations"]
    assert told["evaluated"] == wanted
    assert {phase: told["planned"]["phases"][phase]["evaluations"] for phase in wanted} == wanted

    again = ["edit", str(saved), "--add", "hat", "--dtype", "float32", *asked[-4:]]
    capsys.readouterr()
    assert main([*again, "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"editing: {wanted['editing']} evaluations in ") for line in lines), lines
    assert not any("inverting" in line for line in lines)


@pytest.mark.parametrize("more", [[], ["--target", "a portrait with a beard", "--p2p", "cross=0.5,blend=beard"]])
def test_the_plain_engine_shares_nothing(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "x.json"
    assert main([*EDIT, *more, "--plain", "-o", str(tmp_path / "x.png"), "--report", str(report)]) == 0
    told = json.loads(report.read_text())["evaluations"]
    assert {name: phase["evaluations"] for name, phase in told["planned"]["phases"].items()} == told["evaluated"]
    capsys.readouterr()
    assert main([*EDIT, *more, "--plain", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for phase, evaluations in told["evaluated"].items():
        assert any(line.startswith(f"{phase}: {evaluations} evaluations in ") for line in lines), lines


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--add", "zebra"], "does not know 'zebra'"),
        (["--steps", "1000"], "--steps"),
        (["--p2p"], "pass --target, the new picture"),
        (["--only-where", "mask.png"], "mask is 64 x 16"),
    ],
)
def test_it_refuses_what_the_edit_would_refuse(
    more: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (64, 16), 255).save("mask.png")
    assert main([*EDIT, "--explain", *more]) == 2
    assert said in capsys.readouterr().err


def test_no_weight_is_converted() -> None:
    from ledits_min.app.cli.explain import without_weights

    ledits, device = without_weights("tiny", "cpu", "float32")
    assert device == torch.device("cpu")
    assert all(weight.device.type == "meta" for weight in ledits.unet.parameters())

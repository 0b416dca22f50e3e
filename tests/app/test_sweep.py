"""`ledits sweep`: which cells there are, that each is the edit it says, how often is inverted, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ledits_min import Concept, Inversion, LEdits, PromptToPrompt
from ledits_min.app import outputs
from ledits_min.app.cli import main
from ledits_min.app.cli.options import build_parser
from ledits_min.app.inputs import concept_fields
from ledits_min.app.sheet import fitted
from ledits_min.app.sweep import grid as sweep

SAMPLE = Path(__file__).resolve().parents[2] / "weights/tiny/samples/portrait1.png"
FAST = ["--steps", "6", "--skip", "2", "--dtype", "float32"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with one portrait in it."""
    (tmp_path / "p.png").write_bytes(SAMPLE.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inversions(monkeypatch: pytest.MonkeyPatch) -> list[Inversion]:
    """Every inversion that is made."""
    made: list[Inversion] = []
    plain = LEdits.invert

    def counted(self: LEdits, *positional: Any, **named: Any) -> Inversion:
        made.append(plain(self, *positional, **named))
        return made[-1]

    monkeypatch.setattr(LEdits, "invert", counted)
    return made


def grid(*argv: str) -> sweep.Grid:
    args = build_parser().parse_args(["sweep", "p.png", *argv])
    args.said = []
    return sweep.Grid.of(args)


def told(name: str = "p.sweep.json") -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content: dict[str, Any] = json.loads(Path(name).read_text(), parse_constant=refuse)
    return content


def test_the_first_list_runs_across_and_the_second_down() -> None:
    found = grid("--add", "hat", "--skip", "1,2", "--scale", "3,4,5.5", "--eta", "0.5", "--steps", "9")
    assert (found.across, found.down) == (sweep.Axis("skip", (1, 2)), sweep.Axis("scale", (3.0, 4.0, 5.5)))
    values = [(i, j, cell.skip, cell.scale, cell.eta, cell.steps) for i, j, cell in found]
    wanted = [(i, j, (1, 2)[j], (3.0, 4.0, 5.5)[i], 0.5, 9) for i in range(3) for j in range(2)]
    assert values == wanted and len(found) == 6
    row = grid("--add", "hat", "--scale", "3,4,5.5")
    assert row.down is None and [cell.scale for _, _, cell in row] == [3.0, 4.0, 5.5]
    # Given twice, an option counts as it came last, as everywhere.
    again = grid("--add", "hat", "--scale", "1,2", "--skip", "1,2", "--scale", "3", "--skip", "4,5")
    assert (again.across, again.down) == (sweep.Axis("skip", (4, 5)), None)


def test_a_concept_keeps_what_it_sets_itself() -> None:
    found = grid("--add", "hat:scale=9", "--remove", "beard", "--scale", "1,2", "--threshold", "0.5", "--weight", "2")
    fields = [concept_fields(cell) for _, _, cell in found]
    assert [[Concept(**each) for each in cell] for cell in fields] == [
        [Concept("hat", 9.0, 0.5, weight=2.0), Concept("beard", scale, 0.5, weight=2.0, reverse=True)]
        for scale in (1.0, 2.0)
    ]
    controls = grid("--p2p", "self=0.4", "--source", "hat", "--target", "beard", "--cross", "0,0.5")
    assert [sweep.attention_of(cell) for _, _, cell in controls] == [
        {"cross": 0.0, "self": 0.4}, {"cross": 0.5, "self": 0.4}
    ]  # fmt: skip


SWEEPS = [
    (["--add", "sunglasses", "--scale", "0,2,5", "--threshold", "0.5,0.9"], 1),
    (["--add", "sunglasses", "--warmup", "0,2", "--cooldown", "3,4"], 1),
    (["--add", "sunglasses", "--add", "hat:weight=0.5", "--weight", "1,2", "--momentum-scale", "0,0.5"], 1),
    (["--target", "hat", "--guidance-scale", "1,5", "--source", "smile", "--source-guidance-scale", "1,2,3"], 3),
    (["--add", "sunglasses", "--skip", "0,1,3", "--scale", "1,2"], 3),
    (["--add", "sunglasses", "--steps", "5,6", "--eta", "0,1"], 4),
    (["--add", "sunglasses", "--seed", "0,7", "--scale", "1,2"], 2),
    (["--add", "sunglasses", "--momentum-scale", "0.5", "--momentum-beta", "0,0.5"], 1),
    (["--source", "short black hair", "--target", "short blond hair", "--p2p", "--cross", "0,1", "--self", "0,1"], 1),
    (["--source", "hat", "--target", "red hat", "--p2p", "blend=hat", "--add", "beard", "--mask", "both,noise"], 1),
]


@pytest.mark.parametrize(
    ("argv", "wanted"), SWEEPS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_every_cell_is_the_edit_it_says(
    ledits: LEdits, inversions: list[Inversion], argv: list[str], wanted: int
) -> None:
    """As the library makes it from the settings in the cell's entry, alone and from the start."""
    steps = [] if "--steps" in argv else ["--steps", "6"]
    skip = [] if "--skip" in argv else ["--skip", "2"]
    picture, found = Image.open(SAMPLE).convert("RGB"), grid(*argv, *steps, *skip)
    edited, notes = sweep.run(found, ledits, picture, None, side=128)
    assert len(inversions) == len(notes) == wanted
    for i, j, cell in found:
        one = edited[i][j]
        values, settings = one.entry["values"], one.settings
        assert (one.entry["row"], one.entry["column"]) == (i, j)
        assert values == {axis.name: getattr(cell, axis.name) for axis in found.axes}
        inversion = ledits.invert(
            picture, source=settings["source"], source_guidance_scale=settings["source_guidance_scale"],
            num_steps=settings["num_steps"], skip=settings["skip"], eta=settings["eta"], seed=settings["seeds"][0],
        )  # fmt: skip
        control = settings["prompt_to_prompt"]
        alone = ledits.edit(
            inversion, settings["target"], settings["guidance_scale"], settings["negative"],
            [Concept(**concept) for concept in settings["concepts"]], settings["momentum_scale"],
            settings["momentum_beta"], attention=None if control is None else PromptToPrompt(**control),
        )  # fmt: skip
        assert fitted(alone.images[0], 128).tobytes() == one.picture.tobytes()
        assert one.entry["evaluations"] == ledits.runner.evaluations["editing"]
        means = [float(mask.mean()) for mask in alone.masks]
        assert [mask["mean"] for mask in one.entry["masks"]] == means
    pictures = {one.picture.tobytes() for row in edited for one in row}
    assert len(pictures) > 1  # what was swept changes something


def test_a_sweep_writes_its_sheet_and_its_numbers(
    place: Path, inversions: list[Inversion], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["sweep", "p.png", "--add", "sunglasses", "--scale", "0,4", "--skip", "1,2,3", "--steps", "6", "--seed", "3"]
    assert main([*run, "--dtype", "float32"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("wrote 'p.sweep.png', 'p.sweep.json' in ") and output.err == ""
    assert {path.name for path in place.iterdir()} == {"p.png", "p.sweep.png", "p.sweep.json"}
    assert len(inversions) == 3

    content = told()
    assert content["across"] == {"option": "--scale", "values": [0.0, 4.0]}
    assert content["down"] == {"option": "--skip", "values": [1, 2, 3]}
    assert [(cell["row"], cell["column"]) for cell in content["cells"]] == [(i, j) for i in range(3) for j in range(2)]
    assert [cell["values"] for cell in content["cells"]] == [
        {"skip": skip, "scale": scale} for skip in (1, 2, 3) for scale in (0.0, 4.0)
    ]
    assert [cell["inversion"] for cell in content["cells"]] == [0, 0, 1, 1, 2, 2]
    assert [inversion["evaluations"] for inversion in content["inversions"]] == [5, 4, 3]
    for cell in content["cells"]:
        settings, scale = cell["settings"], cell["values"]["scale"]
        assert (settings["num_steps"], settings["skip"], settings["seeds"]) == (6, cell["values"]["skip"], [3])
        assert settings["concepts"][0]["guidance_scale"] == scale
        steps = 6 - settings["skip"]
        assert cell["evaluations"] == (steps if scale == 0.0 else 2 * steps - 1)  # idle, or after one warm-up step
        assert cell["seconds"] > 0.0
        assert (cell["masks"][0]["mean"] > 0.0) == (cell["change_rms"] > 1.0) == (scale > 0.0)
    fixed = content["settings"]
    assert "skip" not in fixed and fixed["num_steps"] == 6
    assert "guidance_scale" not in fixed["concepts"][0] and fixed["concepts"][0]["text"] == "sunglasses"

    sheet = Image.open("p.sweep.png")
    assert isinstance(sheet, PngImagePlugin.PngImageFile)
    said = str(sheet.text["parameters"])
    assert "+'sunglasses' (threshold 0.9, from step 1)" in said and "6 steps, eta 1" in said and "seed 3" in said
    assert "skip" not in said and "scale" not in said


def test_a_sheet_shows_its_cells(place: Path) -> None:
    """Row by row, column by column: the pictures of the library, on the sheet."""
    run = ["--add", "sunglasses", "--scale", "0,4", "--threshold", "0.5,0.9", *FAST]
    assert main(["sweep", "p.png", *run, "--output-size", "model"]) == 0
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    inversion = ledits.invert("p.png", num_steps=6, skip=2)
    pixels = np.asarray(Image.open("p.sweep.png").convert("RGB"))
    corners = []
    for scale, threshold in ((0.0, 0.5), (4.0, 0.5), (0.0, 0.9), (4.0, 0.9)):
        picture = ledits.edit(inversion, concepts=[Concept("sunglasses", scale, threshold)], output_size="model")
        wanted = np.asarray(fitted(picture.images[0], 192))
        starts = np.argwhere(
            (pixels[:-191, :-191] == wanted[0, 0]).all(-1) & (pixels[191:, 191:] == wanted[-1, -1]).all(-1)
        )
        corners.append([tuple(at) for at in starts if (pixels[at[0] :, at[1] :][:192, :192] == wanted).all()])
    zero = corners[0]
    assert corners[2] == zero and len(zero) == 2 and zero[0][1] == zero[1][1] and zero[0][0] < zero[1][0]
    assert [len(found) for found in (corners[1], corners[3])] == [1, 1]
    assert corners[1][0][0] == zero[0][0] and corners[3][0][0] == zero[1][0]
    assert corners[1][0][1] == corners[3][0][1] > zero[0][1]


def test_one_list_is_one_row_and_a_long_one_is_wrapped(place: Path) -> None:
    short = ["sweep", "p.png", "--add", "hat", "--steps", "2", "--skip", "0"]
    assert main([*short, "--scale", "1,2,3", "-o", "row.png"]) == 0
    assert main([*short, "--scale", ",".join(map(str, range(12))), "-o", "wrapped.webp"]) == 0
    row, wrapped = Image.open("row.png"), Image.open("wrapped.webp")
    assert told("row.json")["down"] is None and len(told("wrapped.json")["cells"]) == 12
    assert row.height < 2.5 * 192 < wrapped.height
    assert wrapped.width == 12 + 10 * (192 + 12)


def test_a_saved_inversion_is_swept_without_another(place: Path, inversions: list[Inversion]) -> None:
    assert main(["invert", "p.png", *FAST, "-o", "i.safetensors"]) == 0
    run = ["--add", "sunglasses", "--scale", "0,3", "--dtype", "float32"]
    assert main(["sweep", "i.safetensors", *run, "-o", "saved.png"]) == 0
    assert len(inversions) == 1
    assert main(["sweep", "p.png", *run, *FAST, "-o", "picture.png"]) == 0
    assert len(inversions) == 2
    assert Image.open("saved.png").tobytes() == Image.open("picture.png").tobytes()
    saved = told("saved.json")
    assert saved["inversions"] == [] and all("inversion" not in cell for cell in saved["cells"])


def test_steps_tell_which_skip_they_bring(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ledits_min.app.sheet as sheets

    seen: dict[str, Any] = {}
    plain = sheets.contact_sheet
    monkeypatch.setattr(
        sheets, "contact_sheet", lambda rows, **more: seen.update(more, rows=rows) or plain(rows, **more)
    )
    assert main(["sweep", "p.png", "--add", "hat", "--steps", "5,10", "--scale", "1,2"]) == 0
    assert seen["columns"] == ["steps 5 (skip 1)", "steps 10 (skip 2)"] and seen["sides"] == ["scale 1", "scale 2"]


def test_what_is_doubtful_is_said_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save("noise.png")
    assert main(["sweep", "noise.png", "--add", "hat", "--scale", "1,2", "--seed", "0,1", *FAST]) == 0
    error = capsys.readouterr().err
    assert error.count("the embedded model was trained on drawn portraits") == error.count("\n") == 1
    assert len(told("noise.sweep.json")["notices"]) == 1
    assert main(["sweep", "p.png", "--steps", "2", "--skip", "0,1"]) == 0
    assert "nothing to change is asked for" in capsys.readouterr().err


def test_settings_in_common() -> None:
    first = {"skip": 1, "seeds": [0], "p": {"cross": 1.0, "self": 0.2}, "n": None, "concepts": [{"a": 1, "b": 2}]}
    second = {"skip": 2, "seeds": [1], "p": {"cross": 1.0, "self": 0.5}, "n": None, "concepts": [{"a": 1, "b": 3}]}
    assert outputs.common([first, second]) == {"p": {"cross": 1.0}, "n": None, "concepts": [{"a": 1}]}
    assert outputs.common([first]) == first


def test_a_number_out_of_range_is_refused_before_torch_is_there(place: Path) -> None:
    text = (
        "import sys; from ledits_min.app.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    run = [sys.executable, "-c", f"{text}; sys.exit(code)", "sweep", "p.png", "--add", "hat", "--scale", "1,2000"]
    finished = subprocess.run(run, capture_output=True, text=True, check=False)
    assert finished.returncode == 2 and finished.stderr.startswith("ledits: error: --scale is 2000.0"), finished.stderr

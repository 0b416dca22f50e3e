"""The `ledits` command where the input is good: what it writes, what it says, and how it is stopped."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ledits_min import Concept, LEdits, __version__
from ledits_min.app import outputs
from ledits_min.app.cli import commands, main
from ledits_min.app.cli.options import build_parser
from ledits_min.files.display import overlay

SAMPLES = Path(__file__).resolve().parents[2] / "weights/tiny/samples"
FAST = ["--steps", "10", "--skip", "3"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with one portrait in it."""
    (tmp_path / "p.png").write_bytes((SAMPLES / "portrait1.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def process(*argv: str, shell: str = 'exec "$@"') -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "ledits_min.app.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def concepts_of(*argv: str) -> list[Concept]:
    return [Concept(**fields) for fields in build_parser().parse_args(["edit", "p.png", *argv]).concepts]


def test_concepts_with_and_without_options() -> None:
    full = "sunglasses:scale=10,threshold=0.9,warmup=2,cooldown=40,weight=1,mask=both"
    wanted = Concept("sunglasses", guidance_scale=10.0, threshold=0.9, warmup_steps=2, cooldown_steps=40, weight=1.0)
    assert concepts_of("--add", full) == [replace(wanted, mask="both")]
    assert concepts_of("--add", " a hat : scale = 3 , weight=.5 ") == [Concept("a hat", guidance_scale=3.0, weight=0.5)]
    assert concepts_of("--remove", "a hat") == [Concept("a hat", reverse=True)]


def test_adding_and_removing_keep_their_order() -> None:
    found = concepts_of("--remove", "hat", "--add", "beard", "--remove", "smile")
    assert [(concept.text, concept.reverse) for concept in found] == [("hat", True), ("beard", False), ("smile", True)]


@pytest.mark.parametrize("text", ["cat: a study", "cat:", "12:30", "a:b:c", "cat:scale", "a=b", "sum: none, some"])
def test_a_colon_alone_makes_no_options(text: str) -> None:
    assert concepts_of(f"--add={text}") == [Concept(text)]


@given(st.text(st.characters(exclude_characters="=", exclude_categories=["Cs"]), min_size=1))
def test_any_text_without_an_equals_sign_is_a_prompt(text: str) -> None:
    if text.strip():
        assert concepts_of(f"--add={text}") == [Concept(text.strip())]
        assert concepts_of(f"--add={text}:scale=2") == [Concept(text.strip(), guidance_scale=2.0)]


def test_prompt_to_prompt_is_kept_in_the_report(place: Path) -> None:
    prompts = ["--source", "long brown hair", "--target", "long black hair"]
    assert main(["edit", "p.png", *prompts, "--p2p", "self=0.4,blend=hair", "--report", "r.json", *FAST]) == 0
    assert main(["edit", "p.png", *prompts, "-o", "pure.png", *FAST]) == 0
    assert json.loads((place / "r.json").read_text())["settings"]["prompt_to_prompt"] == {
        "cross": 0.6, "self": 0.4, "reweight": {}, "blend": ["hair"], "blend_threshold": 0.6
    }  # fmt: skip
    with Image.open("p.ledits.png") as controlled, Image.open("pure.png") as pure:
        assert controlled.tobytes() != pure.tobytes()
        assert "Prompt-to-Prompt cross 0.6, self 0.4, only around 'hair' above 0.6" in controlled.info["parameters"]


def test_masks_a_region_and_the_solver_are_kept_in_the_picture(place: Path) -> None:
    Image.new("L", (32, 32), 255).crop((0, 0, 32, 16)).resize((32, 32)).save("everywhere.png")
    options = ["--mask", "both", "--only-where", "everywhere.png", "--solver", "dpm++"]
    assert main(["edit", "p.png", "--add", "sunglasses", "--add", "hat:mask=noise", *options, *FAST]) == 0
    with Image.open("p.ledits.png") as edited:
        settings, said = json.loads(str(edited.info["ledits"])), str(edited.info["parameters"])
    assert [concept["mask"] for concept in settings["concepts"]] == ["both", "noise"]
    assert settings["solver_order"] == 2 and len(settings["only_where"]) == 64
    assert "mask both" in said and "mask noise" in said and "dpm++" in said and "only where mask" in said


def test_a_preset_is_its_settings(place: Path) -> None:
    assert main(["edit", "p.png", "--add", "sunglasses", "--preset", "fast"]) == 0
    with Image.open("p.ledits.png") as edited:
        settings = json.loads(str(edited.info["ledits"]))
    concept = settings["concepts"][0]
    assert (settings["num_steps"], settings["skip"], concept["warmup_steps"]) == (10, 1, 0)
    assert (concept["guidance_scale"], concept["threshold"], concept["mask"]) == (1.5, 0.95, "percentile")


def test_an_edit_writes_all_it_was_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--masks", "m.png", "--report", "r.json", "--save-inversion", "i.safetensors"]
    assert main(["edit", "p.png", "--add", "sunglasses:scale=9", "--remove", "hat", "--seed", "5", *FAST, *wanted]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("wrote 'p.ledits.png', 'm.png', 'r.json', 'i.safetensors' in ")
    assert output.out.count("\n") == 1
    assert output.err == ""
    assert names(place) == {"p.png", "p.ledits.png", "m.png", "r.json", "i.safetensors"}

    edited, original = Image.open("p.ledits.png"), Image.open("p.png")
    assert isinstance(edited, PngImagePlugin.PngImageFile)
    assert edited.size == original.size
    assert edited.convert("RGB").tobytes() != original.convert("RGB").tobytes()
    settings = json.loads(str(edited.text["ledits"]))
    assert (settings["num_steps"], settings["skip"], settings["seeds"]) == (10, 3, [5])
    first = settings["concepts"][0]
    assert (first["text"], first["guidance_scale"], first["reverse"]) == ("sunglasses", 9.0, False)
    assert "+'sunglasses' (scale 9" in str(edited.text["parameters"])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((place / "r.json").read_text(), parse_constant=refuse)
    assert report["settings"] == settings
    assert report["versions"]["ledits_min"] == __version__
    assert [mask["text"] for mask in report["masks"]] == ["sunglasses", "hat"]
    assert all(0.0 < mask["mean"] <= mask["max"] <= 1.0 for mask in report["masks"])
    assert len(report["trace"]) == 7
    assert list(report["seconds"]) == ["load", "invert", "edit"]


def test_an_edit_of_a_saved_inversion_is_the_same_file(place: Path) -> None:
    edit = ["--add", "sunglasses", "--target", "a man", "--guidance-scale", "3"]
    assert (
        main(["edit", "p.png", *edit, *FAST, "--seed", "3", "-o", "direct.png", "--save-inversion", "a.safetensors"])
        == 0
    )
    assert main(["invert", "p.png", *FAST, "--seed", "3", "-o", "b.safetensors"]) == 0
    assert main(["edit", "a.safetensors", *edit, "-o", "from_a.png"]) == 0
    os.rename("b.safetensors", "no_ending")
    assert main(["edit", "no_ending", *edit]) == 0
    direct = (place / "direct.png").read_bytes()
    assert (place / "from_a.png").read_bytes() == direct
    assert (place / "no_ending.ledits.png").read_bytes() == direct
    assert main(["edit", "p.png", *edit, *FAST, "--seed", "4", "-o", "other_seed.png"]) == 0
    assert Image.open("other_seed.png").tobytes() != Image.open("direct.png").tobytes()


def test_the_command_does_what_the_library_does(place: Path) -> None:
    assert main(["edit", "p.png", "--add", "beard:scale=4", *FAST, "--output-size", "model", "--dtype", "float32"]) == 0
    ledits = LEdits.from_pretrained("tiny", dtype="float32")
    options: dict[str, Any] = {"concepts": [Concept("beard", 4.0)], "output_size": "model", "progress": False}
    inversion, result = ledits.invert_and_edit("p.png", num_steps=10, skip=3, **options)
    found = np.asarray(Image.open("p.ledits.png"))
    assert np.array_equal(found, np.asarray(result.images[0]))
    again = np.asarray(ledits.edit(inversion, **options).images[0])
    assert np.abs(found.astype(int) - again).max() <= 1  # other batches round differently


@pytest.mark.parametrize(
    "option", ["--steps=10", "--skip=3", "--seed=0", "--eta=1", "--solver=ddpm", "--source=man",
               "--source-guidance-scale=1", "--size=64", "--save-inversion=j.safetensors"],
)  # fmt: skip
def test_what_made_an_inversion_stays(place: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["invert", "p.png", *FAST, "-o", "i.safetensors"]) == 0
    assert main(["edit", "i.safetensors", option]) == 2
    assert f"{option.partition('=')[0]} has no effect on a saved inversion" in capsys.readouterr().err
    assert names(place) == {"p.png", "i.safetensors"}


def test_a_preset_leaves_an_inversion_as_it_was_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["invert", "p.png", *FAST, "-o", "i.safetensors"]) == 0
    assert main(["edit", "i.safetensors", "--add", "hat", "--preset", "leditspp", "--report", "r.json"]) == 0
    assert capsys.readouterr().err.count("--preset leditspp: a saved inversion keeps the steps and the solver") == 1
    settings = json.loads((place / "r.json").read_text())["settings"]
    assert (settings["num_steps"], settings["concepts"][0]["mask"]) == (10, "both")


def test_an_inversion_of_another_model_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], checkpoints: object
) -> None:
    checkpoints.write_folder(place / "other")  # type: ignore[attr-defined]
    assert main(["invert", "p.png", "--model", "other", "--steps", "2", "--skip", "0", "-o", "i.safetensors"]) == 0
    capsys.readouterr()
    assert main(["edit", "i.safetensors", "--add", "hat"]) == 2
    assert "another model" in capsys.readouterr().err


def test_overwriting_is_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["edit", "p.png", "--add", "hat", *FAST, "-o", "o.png"]
    assert main(run) == 0
    first = (place / "o.png").read_bytes()
    assert main([*run, "--seed", "9"]) == 2
    assert (place / "o.png").read_bytes() == first
    assert main([*run, "--seed", "9", "--overwrite"]) == 0
    assert (place / "o.png").read_bytes() != first
    assert names(place) == {"p.png", "o.png"}


def test_doubtful_wishes_are_warned_of(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "p.png", "--steps", "2", "--skip", "1", "-o", "a.png"]) == 0
    assert "ledits: warning: nothing to change is asked for" in capsys.readouterr().err
    assert main(["edit", "p.png", "--steps", "2", "--skip", "1", "-o", "b.png", "--add", "hat", "--remove", "hat"]) == 0
    assert "ledits: warning: 'hat' is both added and removed" in capsys.readouterr().err
    assert main(["edit", "p.png", "--steps", "2", "--skip", "1", "-o", "c.png", "--add", "hat", "--size", "256"]) == 0
    assert "ledits: warning: 256 x 256 is worked at, but this model knows squares" in capsys.readouterr().err
    assert main(["edit", "p.png", "--steps", "2", "--skip", "1", "-o", "d.png", "--add", "hat", "--size", "61"]) == 0
    assert "ledits: --size 61: this model works in steps of" in capsys.readouterr().err


def test_a_photograph_keeps_its_size_and_its_notices(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).integers(0, 255, (90, 150, 4), dtype=np.uint8)
    Image.fromarray(values).save("photo.png")
    assert main(["edit", "photo.png", "--add", "hat", *FAST, "-o", "o.webp", "--report", "r.json"]) == 0
    error = capsys.readouterr().err
    assert "ledits: 'photo.png' is partly transparent" in error
    assert "ledits: warning: this model knows squares of 128 x 128 pixels alone" in error
    assert "ledits: warning: the embedded model was trained on drawn portraits" in error
    assert Image.open("o.webp").size == (150, 90)
    assert len(json.loads((place / "r.json").read_text())["notices"]) == 3


@pytest.mark.parametrize(
    "name",
    [
        "with space.png",
        "new\nline.png",
        "\N{DARK SUNGLASSES}.png",
        "-rf.png",
        os.fsdecode(b"\xff\xfe.png"),
        "a" * 200 + ".png",
    ],
    ids=["space", "line break", "emoji", "dash", "not UTF-8", "long"],
)
def test_any_name_works(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    os.rename("p.png", name)
    assert main(["edit", "--add", "hat", *FAST, "--save-inversion", f"./{name}.safetensors", "--", name]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    made = f"{name[:-4]}.ledits.png"
    assert set(os.listdir(".")) == {name, made, f"{name}.safetensors"}
    first = Path(made).read_bytes()
    assert main(["edit", "--add", "hat", "--overwrite", "--output", f"./{made}", "--", f"{name}.safetensors"]) == 0
    assert Path(made).read_bytes() == first


def test_the_masks_picture_is_large_enough_to_read() -> None:
    portrait = Image.open(SAMPLES / "portrait1.png").convert("RGB")
    mask = torch.zeros(16, 16)
    mask[4:8, 8:12] = 0.5
    concepts = [
        Concept("sunglasses"),
        Concept("a very long wish that does not fit under one panel at all", reverse=True),
    ]
    sheet = outputs.mask_picture(portrait, concepts, [mask, torch.zeros(16, 16)])
    assert sheet.width >= 3 * 256
    assert sheet.height >= 256
    covered = np.asarray(overlay(portrait.resize((256, 256)), mask)).astype(int)
    inside, outside = covered[80:112, 144:176], covered[160:, :64]
    assert (inside[..., 0] - inside[..., 2]).min() > 60  # orange to yellow
    assert not (outside[..., 0] - outside[..., 2]).any()  # grey
    assert inside.sum(axis=-1).min() > outside.sum(axis=-1).max()  # lighter: it reads without colour


def test_the_masks_read_without_telling_red_from_green() -> None:
    """As a deuteranope sees it [Machado et al. 2009]: over any grey, stronger is lighter, and yellow."""
    seen = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    ramp = torch.linspace(0.0, 1.0, 256).expand(16, 256)
    for grey in (0, 80, 160, 255):
        covered = np.asarray(overlay(Image.new("RGB", (256, 16), (grey, grey, grey)), ramp))[8] / 255.0
        colours = np.clip(covered**2.2 @ seen.T, 0.0, 1.0)
        lightness = colours @ [0.2126, 0.7152, 0.0722]
        assert np.diff(lightness[::16]).min() > 0.0 and lightness[-1] > lightness[0] + 0.3
        assert (colours[64:, 0] - colours[64:, 2]).min() > 0.02  # yellow, at a quarter of the peak


@pytest.mark.parametrize("concepts", [1, 3, 9])
def test_the_masks_picture_holds_every_panel(concepts: int) -> None:
    masks = [torch.rand(8, 16) for _ in range(concepts)]
    wishes = [Concept(f"wish {k}") for k in range(concepts)]
    sheet = outputs.mask_picture(Image.new("RGB", (1024, 512), "blue"), wishes, masks)
    columns = min(4, concepts + 1)
    assert sheet.width == columns * (512 + 24)
    assert sheet.height > 256 * -(-(concepts + 1) // columns)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "o.png"), 1, "the disk is full ('o.png')"),
        (PermissionError(errno.EACCES, "Permission denied", "o.png"), 1, "Permission denied ('o.png')"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("lost\nkey"), 1, "KeyError: 'lost\\nkey' (a fault of this program"),
        (AssertionError(), 1, "AssertionError: no message"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_goes_wrong_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    error: BaseException, code: int, says: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "load_model", fail)
    assert main(["edit", "p.png", "--add", "hat"]) == code
    output = capsys.readouterr().err
    assert output.startswith(f"ledits: error: {says}")
    assert output.count("\n") == 1
    assert names(place) == {"p.png"}
    assert main(["edit", "p.png", "--add", "hat", "--debug"]) == code
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize("command", [["edit", "p.png"], ["sweep", "p.png", "--scale", "1,2"]], ids=["edit", "sweep"])
@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (Image.new("RGB", (64, 64), "red"), "mask has colours"),
        (Image.new("L", (64, 64), 0), "mask is black"),
        (Image.new("L", (64, 16), 255), "mask is 64 x 16"),
    ],
    ids=["colours", "black", "shape"],
)
def test_a_mask_is_refused_before_anything_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    command: list[str], mask: Image.Image, says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(commands, "load_model", pytest.fail)
    mask.save("mask.png")
    assert main([*command, "--add", "hat", "--only-where", "mask.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ledits: error: {says}")
    assert names(place) == {"p.png", "mask.png"}


STOPPED = """
import os, signal, sys
import ledits_min.{module} as module
from ledits_min.app.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background passes Ctrl-C on as ignored
plain = module.{function}
def stopped(*positional, **named):
    os.kill(os.getpid(), signal.{signal})
    return plain(*positional, **named)
module.{function} = stopped
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("module", "function", "signal", "code"),
    [
        ("engine.fast_networks", "FastUNet.forward", "SIGTERM", 143),
        ("engine.fast_networks", "FastUNet.forward", "SIGINT", 130),
        ("vae", "VAE.decode", "SIGINT", 130),
        ("files.write", "os.replace", "SIGTERM", 143),
    ],
)
def test_a_stopped_process_leaves_nothing(place: Path, module: str, function: str, signal: str, code: int) -> None:
    text = STOPPED.format(module=module, function=function, signal=signal)
    run = ["edit", "p.png", "--add", "hat", *FAST, "--masks", "m.png", "--save-inversion", "i.safetensors"]
    finished = subprocess.run([sys.executable, "-c", text, *run], capture_output=True, text=True, check=False)
    assert finished.returncode == code, finished.stderr
    assert finished.stderr == f"ledits: error: {'terminated' if code == 143 else 'interrupted'}\n"
    assert names(place) == {"p.png"}


def test_a_signal_that_a_library_takes_for_its_own_failure_is_still_named(place: Path) -> None:
    text = STOPPED.format(module="engine.fast_networks", function="FastUNet.forward", signal="SIGTERM").replace(
        "module.FastUNet.forward = stopped",
        """
def translated(*arguments, **named):
    try:
        return stopped(*arguments, **named)
    except BaseException:
        raise SystemError("returned a result with an exception set") from None
module.FastUNet.forward = translated""",
    )
    assert "translated" in text
    run = ["edit", "p.png", "--add", "hat", *FAST, "--save-inversion", "i.safetensors"]
    finished = subprocess.run([sys.executable, "-c", text, *run], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (143, "ledits: error: terminated\n")
    assert names(place) == {"p.png"}


def test_a_disk_that_fills_up_leaves_nothing(place: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    finished = process("edit", "p.png", "--add", "hat", *FAST, shell='ulimit -f 1; exec "$@"')
    assert finished.returncode == 1
    assert finished.stderr.startswith("ledits: error: ")
    assert finished.stderr.count("\n") == 1
    assert names(place) == {"p.png"}


@pytest.mark.parametrize("redirect", ["<&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_matter(place: Path, redirect: str) -> None:
    finished = process("edit", "p.png", "--add", "hat", *FAST, shell=f'exec "$@" {redirect}')
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert names(place) == {"p.png", "p.ledits.png"}
    Image.open(place / "p.ledits.png").load()


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>/dev/full --debug"])
def test_what_cannot_be_said_changes_nothing(place: Path, redirect: str) -> None:
    """Neither the exit code of a refusal nor an edit that has something to warn of."""
    redirect, *debug = redirect.split()
    shell = f'exec "$@" {redirect}'
    assert process("edit", "none.png", *debug, shell=shell).returncode == 2
    finished = process("edit", "p.png", *FAST, *debug, shell=shell)  # asks for nothing, which is warned of
    assert finished.returncode == 0
    Image.open(place / "p.ledits.png").load()


def test_a_very_long_prompt_is_not_repeated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "p.png", "--add", "zeppelin " * 25_000]) == 2
    assert len(capsys.readouterr().err) < 5000


def test_a_prompt_that_is_too_long_is_told_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In our words alone: transformers has a line of its own for it."""
    assert main(["edit", "p.png", "--add", "a hat " * 100, *FAST]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ledits: warning: the prompt is ") and len(line) < 500


def test_the_syntax_of_other_programs_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model knows none of these signs as words, so that it refuses them, too."""
    assert main(["edit", "p.png", "--model", "tiny", "--explain", "--target", "a hat BREAK a man"]) == 2
    assert "'break'" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_failure(place: Path) -> None:
    finished = process("inspect", "tiny", shell='"$@" | true')
    assert finished.stderr == ""


def test_help_and_version_need_no_torch() -> None:
    text = "import sys; from ledits_min.app.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for option, says in (
        (["--help"], "inspect"),
        (["edit", "--help"], "--save-inversion"),
        (["--version"], __version__),
    ):
        finished = subprocess.run([sys.executable, "-c", text, *option], capture_output=True, text=True, check=True)
        assert says in finished.stdout


def test_inspect_describes_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tiny"]) == 0
    output = capsys.readouterr().out
    assert "diffusers folder" in output
    assert all(part in output for part in ("unet", "vae", "text", "loads"))

"""The options that change what a model is made of, and Hugging Face ids, through the command's entry point."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from ledits_min import LEdits
from ledits_min.app.cli import main
from ledits_min.app.cli.options import build_parser
from ledits_min.config import SD15_TEXT, SD15_UNET, SD15_VAE, SDXL_VAE
from ledits_min.files.configs import config_json

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "weights/tiny"
FAST = ["--steps", "4", "--skip", "2", "--add", "sunglasses"]
MODEL = ["--dtype", "float32", "--device", "cpu"]
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with one portrait, and LoRAs for the embedded model: kohya's names, one layer."""
    (tmp_path / "p.png").write_bytes((TINY / "samples/portrait1.png").read_bytes())
    unet = load_file(TINY / "unet/diffusion_pytorch_model.safetensors")
    outputs, inputs = unet[f"{LAYER}.weight"].shape
    key = f"lora_unet_{LAYER}".replace(".", "_")
    lora = {f"{key}.lora_down.weight": torch.randn(2, inputs), f"{key}.lora_up.weight": torch.randn(outputs, 2)}
    save_file(lora, tmp_path / "style.safetensors")
    save_file({name.replace("mid_block", "no_block"): t for name, t in lora.items()}, tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(name: str) -> bytes:
    return Image.open(name).convert("RGB").tobytes()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The last line of a refusal; notes on the model may stand before it."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("ledits: error: ")
    return str(line)


def test_a_lora_changes_the_picture_and_the_report_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "p.png", *FAST, *MODEL, "-o", "plain.png"]) == 0
    lora = ["--lora", "style.safetensors:0.5", "--lora", "style.safetensors:0.25"]
    assert main(["edit", "p.png", *FAST, *MODEL, *lora, "-o", "style.png", "--report", "r.json"]) == 0
    assert pixels("plain.png") != pixels("style.png")
    notices = json.loads(Path("r.json").read_text())["notices"]
    wanted = ["lora: 'style.safetensors' merged at scale 0.5 into 1 of the unet's weights, rank 2"]
    assert [notice for notice in notices if notice.startswith("lora")] == [
        *wanted,
        wanted[0].replace("0.5", "0.25"),
    ]
    assert capsys.readouterr().err.count("ledits: lora: ") == 2
    assert main(["edit", "p.png", *FAST, *MODEL, "--lora", "style.safetensors:0.75", "-o", "sum.png"]) == 0
    difference = max(abs(a - b) for a, b in zip(pixels("sum.png"), pixels("style.png"), strict=True))
    assert difference <= 1
    assert main(["edit", "p.png", *FAST, *MODEL, "--lora", "style.safetensors:0", "-o", "nought.png"]) == 0
    assert pixels("nought.png") == pixels("plain.png")


def test_an_inversion_belongs_to_its_lora(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = ["--lora", "style.safetensors"]
    assert main(["invert", "p.png", *FAST[:4], *MODEL, *lora, "-o", "i.safetensors"]) == 0
    assert main(["edit", "i.safetensors", *FAST[4:], *MODEL, *lora, "-o", "a.png"]) == 0
    assert main(["edit", "p.png", *FAST, *MODEL, *lora, "--save-inversion", "j.safetensors", "-o", "b.png"]) == 0
    assert pixels("a.png") == pixels("b.png")
    for options in ([], ["--lora", "style.safetensors:0.9"], [*lora, *lora]):
        assert "another model" in refused(capsys, "edit", "i.safetensors", *FAST[4:], *MODEL, *options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--lora other.safetensors", "1 of its names match nothing in this model ('lora_unet_no_block"),
        ("--lora absent.safetensors", "'absent.safetensors' cannot be read: No such file"),
        ("--lora style.safetensors:1000", "scale of the LoRA 'style.safetensors' is 1000"),
        ("--lora :0.5", "':0.5' names no file"),
        ("--lora style.safetensors:", "'style.safetensors:' cannot be read"),
        ("--lora p.png", "is a PNG picture"),
        ("--lora x.ckpt", "is a pickle by its name"),
        ("--lora .", "is a folder; pass the LoRA's .safetensors file"),
        ("--lora style.safetensors -o style.safetensors", "must end in"),
        ("--vae style.safetensors", "is a LoRA file: it only changes another checkpoint"),
        ("--model style.safetensors", "pass that one as --model, and this file as --lora"),
        ("--model org/name", "run: hf download org/name --include"),
        ("--vae org/name", "run: hf download org/name --include"),
        ("--tokenizer absent", "'absent' holds no tokenizer"),
        ("--ema", "those hold one set of weights; --ema is for single files"),
        ("--add sunglases", "does not know 'sunglases' (did you mean sunglasses?); it knows: "),
    ],
)
def test_refusals(place: Path, capsys: pytest.CaptureFixture[str], options: str, says: str) -> None:
    before = set(place.iterdir())
    assert says in refused(capsys, "edit", "p.png", *FAST, *MODEL, *options.split())
    assert set(place.iterdir()) == before


def test_a_bad_checkpoint_is_refused_before_the_text_library_is_imported(place: Path) -> None:
    """transformers takes seconds to import; a wrong file is told without it."""
    (place / "bad.safetensors").write_bytes(b"<html>")
    code = (
        "import sys; from ledits_min.app.cli import main; code = main(sys.argv[1:]); "
        "assert 'transformers' not in sys.modules, 'imported'; sys.exit(code)"
    )
    for option in ("--model", "--vae", "--lora"):
        command = [sys.executable, "-c", code, "edit", "p.png", *FAST, option, "bad.safetensors"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "is an HTML or XML page" in done.stderr, done.stderr


def test_where_a_scale_begins() -> None:
    def parsed(text: str) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = build_parser().parse_args(["edit", "p.png", "--lora", text]).lora
        return found

    assert parsed("a.safetensors") == [("a.safetensors", 1.0)]
    assert parsed("a.safetensors:-.5") == [("a.safetensors", -0.5)]
    assert parsed("C:\\a.safetensors") == [("C:\\a.safetensors", 1.0)]
    assert parsed("a:1:0.5") == [("a:1", 0.5)]
    assert parsed("a:b") == [("a:b", 1.0)]


def as_dialect(checkpoints: ModuleType, dialect: str, target: Path) -> Path:
    """A random full-size VAE of SD 1.x in one of the ways people have it; float16, to be small."""
    shape = {"unet": checkpoints.REDUCED_UNET, "vae": SD15_VAE, "text": checkpoints.REDUCED_TEXT}
    states = checkpoints.random_states(**shape)
    ldm = checkpoints.ldm_state(states, shape["unet"], SD15_VAE, ("vae",))
    if dialect == "LDM, prefixed":
        checkpoints.save(target / "vae.safetensors", ldm, torch.float16)
    elif dialect == "LDM, bare":
        bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in ldm.items()}
        checkpoints.save(target / "vae.safetensors", bare, torch.float16)
    elif dialect == "diffusers file":
        checkpoints.save(target / "vae.safetensors", states["vae"], torch.float16)
    elif dialect == "diffusers file, old names":
        checkpoints.save(target / "vae.safetensors", checkpoints.old_vae(states["vae"]), torch.float16)
    else:
        (target / "vae").mkdir()
        (target / "vae/config.json").write_text(json.dumps(config_json(SD15_VAE)))
        name = "diffusion_pytorch_model.fp16.safetensors"
        checkpoints.save(target / "vae" / name, states["vae"], torch.float16)
        return target if dialect == "whole folder" else target / "vae"
    return target / "vae.safetensors"


DIALECTS = ["LDM, prefixed", "LDM, bare", "diffusers file", "diffusers file, old names", "its folder", "whole folder"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_vae_in_every_dialect(
    checkpoints: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    """A checkpoint of factor 8 edited and inspected with another VAE: its weights are the ones that arrive."""
    small_vae = replace(checkpoints.REDUCED_VAE, block_out_channels=(8, 16, 16, 16))
    checkpoints.write_folder(place / "model", vae=small_vae)
    vae = as_dialect(checkpoints, dialect, place)
    loaded: list[LEdits] = []
    load = LEdits.from_pretrained

    def keep(*args: Any, **options: Any) -> LEdits:
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(LEdits, "from_pretrained", keep)
    command = ["edit", "p.png", "--model", "model", "--vae", str(vae), *FAST, *MODEL, "--size", "64", "-o", "o.png"]
    assert main(command) == 0
    wanted = checkpoints.random_states(vae=SD15_VAE)["vae"]
    for name, parameter in loaded[0].vae.named_parameters():
        assert torch.equal(parameter, wanted[name].half().float()), name


def test_parts_that_do_not_belong(checkpoints: ModuleType, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another factor, another number of channels, another scale, another family, another width."""
    reduced = checkpoints.REDUCED_VAE
    checkpoints.write_folder(place / "model")
    checkpoints.write_folder(place / "factor8", vae=replace(reduced, block_out_channels=(8, 16, 16, 16)))
    checkpoints.write_folder(place / "channels", vae=replace(reduced, latent_channels=3))
    checkpoints.write_folder(place / "scale", vae=replace(reduced, scaling_factor=0.13025))
    checkpoints.write_folder(place / "wide", text=replace(checkpoints.REDUCED_TEXT, hidden_size=32))
    checkpoints.write_hollow(place / "sd15.safetensors", checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT))
    (place / "xl/vae").mkdir(parents=True)
    shutil.copy(place / "model/vae/diffusion_pytorch_model.safetensors", place / "xl/vae")
    (place / "xl/vae/config.json").write_text(json.dumps(config_json(SDXL_VAE)))
    for options, says in (
        ("--model model --vae factor8", "one latent of 8 x 8 pixels, the one that the unet was trained with 4 x 4"),
        ("--model model --vae sd15.safetensors", "one latent of 8 x 8 pixels"),
        ("--model tiny --vae model", "one latent of 4 x 4 pixels"),
        ("--model model --vae channels", "the vae has 3; use parts of one family"),
        ("--model model --vae scale", "scaling_factor 0.13025 belongs to another family"),
        ("--model sd15.safetensors --vae xl/vae", "use a VAE of Stable Diffusion 1.x"),
        ("--model model --text-encoder wide", "the text encoder is 32 wide, the unet wants 24"),
        ("--model model --text-encoder sd15.safetensors", "the text encoder is 768 wide, the unet wants 24"),
        ("--model model --vae model/text_encoder", "'model/text_encoder' holds no diffusion_pytorch_model.safetensors"),
        ("--model model --tokenizer model", "holds no tokenizer"),
    ):
        assert says in refused(capsys, "edit", "p.png", *FAST, *options.split()), options


def test_text_encoder_and_tokenizer(checkpoints: ModuleType, place: Path) -> None:
    """The embedded model with its own text encoder and tokenizer passed as parts is the embedded model."""
    parts = ["--text-encoder", str(TINY / "text_encoder"), "--tokenizer", str(TINY / "tokenizer")]
    for name, options in (("a.png", []), ("b.png", parts), ("c.png", [*parts, "--vae", str(TINY)])):
        assert main(["edit", "p.png", *FAST, *MODEL, *options, "-o", name]) == 0
    assert pixels("a.png") == pixels("b.png") == pixels("c.png")
    shutil.copytree(TINY / "text_encoder", "other")
    state = load_file("other/model.safetensors")
    name = "final_layer_norm.bias" if "final_layer_norm.bias" in state else "text_model.final_layer_norm.bias"
    save_file(state | {name: state[name] + 1.0}, "other/model.safetensors")
    assert main(["edit", "p.png", *FAST, *MODEL, "--text-encoder", "other", "-o", "d.png"]) == 0
    assert pixels("d.png") != pixels("a.png")


Inspect = Callable[..., str]


@pytest.fixture
def inspected(place: Path, capsys: pytest.CaptureFixture[str]) -> Inspect:
    def verdict(*argv: str) -> str:
        capsys.readouterr()
        code = main(["inspect", *argv])
        found = capsys.readouterr().out.rpartition("verdict   ")[2].strip()
        assert code == (2 if found.startswith("refused") else 0)
        return found

    return verdict


def test_inspect_judges_the_whole(checkpoints: ModuleType, place: Path, inspected: Inspect) -> None:
    listing = checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT)
    vae = {name: entry for name, entry in listing.items() if name.startswith("first_stage_model.")}
    checkpoints.write_hollow(place / "no_vae.safetensors", {n: e for n, e in listing.items() if n not in vae})
    checkpoints.write_hollow(place / "vae.safetensors", vae)
    assert inspected("no_vae.safetensors").startswith("incomplete: ")
    assert inspected("no_vae.safetensors", "--vae", "vae.safetensors") == "loads"
    assert inspected("no_vae.safetensors", "--vae", "style.safetensors").startswith("refused: 'style.safetensors' is a")
    assert inspected("tiny", "--lora", "style.safetensors:0.5") == "loads"
    assert inspected("tiny", "--lora", "other.safetensors").startswith("refused: 'other.safetensors': 1 of its names")
    assert inspected("tiny", "--ema").startswith("refused: ")
    assert "this file as --lora" in inspected("style.safetensors")


def test_a_hugging_face_id(place: Path, inspected: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model, as a cache would hold it, makes the same file under its id."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    commit = "3" * 40
    shutil.copytree(TINY, place / "hub/models--org--tiny/snapshots" / commit)
    (place / "hub/models--org--tiny/refs").mkdir()
    (place / "hub/models--org--tiny/refs/main").write_text(commit)
    assert inspected("org/tiny") == "loads"
    for name, model in (("a.png", "tiny"), ("b.png", "org/tiny"), ("c.png", f"org/tiny@{commit}")):
        assert main(["edit", "p.png", *FAST, *MODEL, "--model", model, "-o", name]) == 0
    assert pixels("a.png") == pixels("b.png") == pixels("c.png")


def test_a_new_word_and_an_earlier_layer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--embedding and --clip-skip reach the model, change the picture, and are told; wrong ones are refused."""
    save_file({"emb_params": torch.randn(2, 128)}, "w.safetensors")
    argv = ["edit", "p.png", "--steps", "4", "--skip", "2", "--target", "a portrait of glimmer", *MODEL]
    assert main([*argv, "--embedding", "w.safetensors:glimmer", "-o", "a.png"]) == 0
    assert "is the word 'glimmer', 2 vectors" in capsys.readouterr().err
    assert main([*argv, "--embedding", "w.safetensors:glimmer", "--clip-skip", "2", "-o", "b.png"]) == 0
    assert "clip skip 2: the text is read from layer 2 of 3" in capsys.readouterr().err
    assert pixels("a.png") != pixels("b.png")
    assert "'glimmer'" in refused(capsys, *argv)
    assert "1 .. 3" in refused(capsys, "edit", "p.png", *FAST, *MODEL, "--clip-skip", "4")
    assert "w.safetensors" in refused(capsys, *argv, "--embedding", "w.safetensors", "-o", "w.safetensors")

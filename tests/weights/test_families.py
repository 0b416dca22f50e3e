"""SD 2.x and SDXL at the door: what is recognised, what is missing, which parts do not mix, eps or v."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from ledits_min.config import SD15_SCHEDULE, SD15_VAE, SD20_UNET, SD21_UNET, SDXL_VAE
from ledits_min.errors import InputError
from ledits_min.files.configs import config_json
from ledits_min.files.header import read_header
from ledits_min.weights.inspect import inspect
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.names.ldm import UNET_PREFIX
from ledits_min.weights.read.published import SD15, SD20, SDXL, Family
from ledits_min.weights.read.survey import survey_whole

Listing = dict[str, Any]
V_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.fixture(scope="module")
def listings(checkpoints: ModuleType) -> dict[str, Listing]:
    """A whole single file of every family, by rule."""
    return {family.name: checkpoints.family_listing(family.name, family.configs) for family in (SD15, SD20, SDXL)}


@pytest.fixture
def hollow(checkpoints: ModuleType, listings: dict[str, Listing], tmp_path: Path) -> Callable[..., Path]:
    """A file of full size and no weight: hollow("SDXL") whole, hollow("SDXL", "conditioner.") one part of it."""

    def write(family: str, *prefixes: str, strip: str = "", **extra: Any) -> Path:
        names = {name: entry for name, entry in listings[family].items() if name.startswith(prefixes or ("",))}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        metadata = extra.pop("metadata", None)
        checkpoints.write_hollow(path, {name.removeprefix(strip): e for name, e in names.items()} | extra, metadata)
        return path

    return write


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x", "SDXL"])
def test_parts_of_another_checkpoint_and_precision(
    checkpoints: ModuleType, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """vae= and text_encoder= bring their own values in their own precision; the UNet is not touched."""
    states = checkpoints.write_family_folder(tmp_path / "a", family)
    others = checkpoints.write_family_folder(tmp_path / "b", family, dtype=dtype, seed=1)
    found = load_checkpoint(tmp_path / "a", vae=tmp_path / "b", text_encoder=tmp_path / "b")
    for part in states:
        state = states["unet"] if part == "unet" else others[part]
        stored = torch.float32 if part == "unet" else dtype
        for name, tensor in getattr(found, part).items():
            assert torch.equal(tensor.double(), state[name].to(stored).float().double()), name
    assert sum("taken from" in note for note in found.notes) == len(states) - 1


@pytest.mark.parametrize(("family", "parts"), [(SD20, 3), (SDXL, 4)], ids=["SD 2.x", "SDXL"])
def test_a_whole_single_file_loads(hollow: Callable[..., Path], family: Family, parts: int) -> None:
    """Through the public door, at full size; the zeros take no disk."""
    path = hollow(family.name)
    report = inspect(path)
    assert (report.family, report.verdict, len(report.parts)) == (family.name, "loads", parts)
    checkpoint = load_checkpoint(path)
    assert checkpoint.unet_config == family.configs["unet"] and checkpoint.vae_config == family.configs["vae"]
    assert checkpoint.text_config == family.configs["text"]
    assert checkpoint.text_2_config == family.configs.get("text_2")
    assert sum(tensor.numel() for tensor in checkpoint.unet.values()) in (865_910_724, 2_567_463_684)
    assert checkpoint.zeros_for_empty_prompt == (family is SDXL)


def test_missing_parts_are_named_with_the_way_to_supply_them(hollow: Callable[..., Path]) -> None:
    unet = hollow("SDXL", UNET_PREFIX)
    report = inspect(unet)
    assert (report.verdict, report.missing) == ("incomplete", ("vae", "text", "text_2"))
    assert "a folder or file that has both text encoders" in report.reason and "--vae FILE" in report.reason
    assert str(report).count("has both text encoders") == 3
    vae, text = hollow("SDXL", "first_stage_model."), hollow("SDXL", "conditioner.")
    second = hollow("SDXL", "conditioner.embedders.1.model.", strip="conditioner.embedders.1.model.")
    assert inspect(second).family == "SDXL" and inspect(second).verdict == "part"
    assert inspect(text).verdict == "part" and len(inspect(text).parts) == 2
    survey = survey_whole(unet, vae=vae, text_encoder=text)
    assert set(survey.parts) == {"unet", "vae", "text", "text_2"} and survey.configs["vae"] == SDXL_VAE
    with pytest.raises(InputError, match="holds no text .*both text encoders|holds no text"):
        survey_whole(unet, vae=vae, text_encoder=second)
    # One of both encoders replaced, the other one kept.
    kept = survey_whole(hollow("SDXL"), text_encoder=second)
    assert {tensor.path for tensor in kept.parts["text_2"].values()} == {second}
    assert second not in {tensor.path for tensor in kept.parts["text"].values()}


def test_parts_of_two_families_do_not_mix(hollow: Callable[..., Path], checkpoints: ModuleType, tmp_path: Path) -> None:
    one, two, xl = hollow("SD 1.x"), hollow("SD 2.x"), hollow("SDXL")
    for model, text, reason in (
        (one, two, "text tensors do not fit Stable Diffusion 1.x"),
        (two, one, "text tensors do not fit Stable Diffusion 2.x"),
        (one, xl, "a second text encoder, as SDXL has, but the unet reads one"),
        (xl, two, "text tensors do not fit Stable Diffusion 1.x"),
    ):
        with pytest.raises(InputError, match=reason):
            survey_whole(model, text_encoder=text)
    # CLIP-L is the same in SD 1.x and SDXL.
    assert survey_whole(xl, text_encoder=one).parts["text"]["final_layer_norm.bias"].path == one
    for model, config in ((xl, SD15_VAE), (two, SDXL_VAE)):
        folder = tmp_path / f"vae{config.scaling_factor}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_json(config)))
        names = {name: ("F16", shape) for name, shape in checkpoints.vae_shapes(config).items()}
        checkpoints.write_hollow(folder / "diffusion_pytorch_model.safetensors", names)
        with pytest.raises(InputError, match="belongs to another family than the unet"):
            survey_whole(model, vae=folder)


def test_a_second_text_encoder_in_a_file_of_sd1_is_refused(
    checkpoints: ModuleType, listings: dict[str, Listing], tmp_path: Path
) -> None:
    second = {name: entry for name, entry in listings["SDXL"].items() if ".embedders.1." in name}
    checkpoints.write_hollow(tmp_path / "x.safetensors", listings["SD 1.x"] | second)
    report = inspect(tmp_path / "x.safetensors")
    assert report.verdict == "refused" and "the unet reads one" in report.reason


def test_faulty_folders_of_sdxl(checkpoints: ModuleType, tmp_path: Path) -> None:
    checkpoints.write_family_folder(tmp_path / "xl", "SDXL")
    faults: dict[str, tuple[Callable[[Path], Any], str]] = {
        "no second text encoder": (lambda f: shutil.rmtree(f / "text_encoder_2"), "holds no text_2"),
        "no first text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "holds no text "),
        "pools to another width": (
            lambda f: rewrite(f / "unet/config.json", projection_class_embeddings_input_dim=70),
            "do not fit",
        ),
        "encoders exchanged": (
            lambda f: (
                (f / "text_encoder").rename(f / "x"),
                (f / "text_encoder_2").rename(f / "text_encoder"),
                (f / "x").rename(f / "text_encoder_2"),
            ),
            "text_projection.weight",
        ),
        "no size features": (
            lambda f: rewrite(f / "unet/config.json", addition_embed_type=None),
            "addition_embed_type",
        ),
    }
    for name, (fault, reason) in faults.items():
        folder = shutil.copytree(tmp_path / "xl", tmp_path / name)
        fault(folder)
        with pytest.raises(InputError, match=reason) as caught:
            load_checkpoint(folder)
        assert str(caught.value).isprintable(), name


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sdxl_in_the_hugging_face_cache(
    checkpoints: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--xl/snapshots/main"
    checkpoints.write_family_folder(snapshot, "SDXL")
    assert len(load_checkpoint("org/xl").text_2) == len(checkpoints.family_states("SDXL")["text_2"])
    (snapshot / "text_encoder_2/model.safetensors").unlink()
    with pytest.raises(InputError, match="without the text_2 .* hf download org/xl .*text_encoder"):
        load_checkpoint("org/xl")


@pytest.mark.parametrize(
    ("said", "wanted"), [({}, True), ({"force_zeros_for_empty_prompt": False}, False), (None, True)]
)
def test_zeros_for_the_empty_prompt(
    checkpoints: ModuleType, tmp_path: Path, said: dict[str, Any] | None, wanted: bool
) -> None:
    checkpoints.write_family_folder(tmp_path / "xl", "SDXL")
    first = load_checkpoint(tmp_path / "xl").fingerprint
    index = tmp_path / "xl/model_index.json"
    index.write_text(json.dumps(said)) if said is not None else index.unlink()
    checkpoint = load_checkpoint(tmp_path / "xl")
    assert checkpoint.zeros_for_empty_prompt == wanted and (checkpoint.fingerprint == first) == wanted


def test_both_encoders_of_sdxl_are_in_the_fingerprint(checkpoints: ModuleType, tmp_path: Path) -> None:
    checkpoints.write_family_folder(tmp_path / "xl", "SDXL")
    first = load_checkpoint(tmp_path / "xl").fingerprint
    for folder in ("text_encoder", "text_encoder_2"):
        other = shutil.copytree(tmp_path / "xl", tmp_path / folder)
        path = other / folder / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[read_header(path).data_start] ^= 1
        path.write_bytes(raw)
        assert load_checkpoint(other).fingerprint != first


# --- eps or v -------------------------------------------------------------------------------------------------------


def write_spread(path: Path, spread: float) -> None:
    """Give the weight that tells v from eps this standard deviation; float16 as in the hollow files."""
    header = read_header(path)
    info = header.tensors[f"{UNET_PREFIX}{V_SPREAD}"]
    values = torch.tensor([spread, -spread]).half().repeat(info.numel // 2)
    with open(path, "r+b") as file:
        file.seek(header.data_start + info.begin)
        file.write(values.numpy().tobytes())


@pytest.mark.parametrize(("spread", "wanted"), [(0.05, "epsilon"), (0.12, "v_prediction")])
def test_sd2_guesses_where_nothing_says_it(hollow: Callable[..., Path], spread: float, wanted: str) -> None:
    path = hollow("SD 2.x")
    write_spread(path, spread)
    notes = "\n".join(inspect(path).oddities)
    assert "eps or v: neither metadata nor a marker says it" in notes
    checkpoint = load_checkpoint(path)
    assert checkpoint.schedule_config.prediction_type == wanted
    assert checkpoint.unet_config == (SD20_UNET if wanted == "epsilon" else SD21_UNET)
    (note,) = [note for note in checkpoint.notes if "guessed" in note]
    assert note.startswith(wanted) and f"{spread:.3f}"[:-1] in note and "--prediction-type" in note
    # The user's word ends the guessing.
    for said, meant in (("eps", "epsilon"), ("v", "v_prediction")):
        checkpoint = load_checkpoint(path, prediction_type=said)
        assert checkpoint.schedule_config.prediction_type == meant
        assert not any("guessed" in note or "eps or v" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("metadata", "marker", "wanted"),
    [
        ({"modelspec.prediction_type": "v"}, False, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, False, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, False, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, False, "epsilon"),
        ({}, True, "v_prediction"),
    ],
)
def test_what_a_file_says_of_itself_is_believed(
    hollow: Callable[..., Path], metadata: dict[str, str], marker: bool, wanted: str
) -> None:
    for family in ("SD 2.x", "SDXL"):
        extra = {"v_pred": ("F32", (0,))} if marker else {}
        path = hollow(family, metadata=metadata, **extra)
        survey = survey_whole(path)
        assert survey.schedule == replace(SD15_SCHEDULE, prediction_type=wanted) and survey.undecided is None
        assert any(note.startswith(f"{wanted}: the file") for note in survey.notes)


@pytest.mark.parametrize("title", ["SDXL Turbo v1", "stable-diffusion-xl-turbo", "Lightning McQueen", "x LCM"])
def test_what_a_title_says_is_a_warning(hollow: Callable[..., Path], title: str) -> None:
    """A title names what its owner likes; tensors and configs alone are refused."""
    for key in ("modelspec.title", "modelspec.architecture"):
        notes = survey_whole(hollow("SDXL", metadata={key: title})).notes
        assert sum("distilled to a few steps" in note for note in notes) == 1
    assert "distilled" not in str(survey_whole(hollow("SDXL", metadata={"modelspec.title": "x"})).notes)


def test_a_folder_without_scheduler_config_is_guessed_too(checkpoints: ModuleType, tmp_path: Path) -> None:
    """SD 2's unet at full size; the other parts need not be there for the question to come up."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(config_json(SD21_UNET)))
    names = {name: ("F16", shape) for name, shape in checkpoints.unet_shapes(SD21_UNET).items()}
    checkpoints.write_hollow(tmp_path / "unet/diffusion_pytorch_model.safetensors", names)
    notes = "\n".join(inspect(tmp_path).oddities)
    assert "no scheduler config" in notes and "eps or v" in notes

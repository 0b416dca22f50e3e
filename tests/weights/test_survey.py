"""What headers and configs decide: parts from anywhere, prediction type, tokenizer, and every refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ledits_min.config import SD15_SCHEDULE, SD15_TEXT, SD15_UNET, SD15_VAE, ScheduleConfig
from ledits_min.errors import InputError
from ledits_min.files.configs import config_json
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.read.survey import survey_file

UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def edit_state(part: str, file: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[ModuleType, Path], Any]:
    """A fault: the folder's file of one part rewritten with `change` done to its weights."""

    def apply(checkpoints: ModuleType, folder: Path) -> None:
        state = checkpoints.random_states()[part]
        change(state)
        checkpoints.save_file(state, folder / file)

    return apply


def remove(*files: str) -> Callable[[ModuleType, Path], Any]:
    def apply(checkpoints: ModuleType, folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return apply


def write(file: str, content: bytes | dict[str, Any]) -> Callable[[ModuleType, Path], Any]:
    def apply(checkpoints: ModuleType, folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return apply


def rewrite_config(file: str, **changes: Any) -> Callable[[ModuleType, Path], Any]:
    def apply(checkpoints: ModuleType, folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | changes))

    return apply


def rename(old: str, new: str) -> Callable[[ModuleType, Path], Any]:
    return lambda checkpoints, folder: (folder / old).rename(folder / new)


def both(*faults: Callable[[ModuleType, Path], Any]) -> Callable[[ModuleType, Path], Any]:
    def apply(checkpoints: ModuleType, folder: Path) -> None:
        for fault in faults:
            fault(checkpoints, folder)

    return apply


def with_channels(count: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.update({"conv_in.weight": torch.zeros(16, count, 3, 3)})


def with_context(width: int) -> Callable[[dict[str, Tensor]], Any]:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if "attn2.to_k" in name or "attn2.to_v" in name]:
            state[name] = torch.zeros(state[name].shape[0], width)

    return change


BAD_FOLDERS: dict[str, tuple[Callable[[ModuleType, Path], Any], str]] = {
    "one tensor missing": (
        edit_state("unet", UNET_FILE, lambda s: s.pop("mid_block.resnets.0.conv1.weight")),
        "1 missing .'mid_block.resnets.0.conv1.weight'",
    ),
    "seven missing": (
        edit_state("vae", VAE_FILE, lambda s: [s.pop(n) for n in list(s) if "encoder.down_blocks.1.resnets.0" in n]),
        r"10 missing \(.*, \.\.\.\)",
    ),
    "one too many": (
        edit_state("text", TEXT_FILE, lambda s: s.update({"encoder.layers.9.mlp.fc1.bias": torch.zeros(3)})),
        "1 unexpected .'encoder.layers.9.mlp.fc1.bias'",
    ),
    "another shape": (
        edit_state("unet", UNET_FILE, lambda s: s.update({"conv_out.bias": torch.zeros(5)})),
        r"'conv_out.bias' is \[5\], wanted \[4\]",
    ),
    "transposed": (
        edit_state("text", TEXT_FILE, lambda s: s.update({n: t.T.contiguous() for n, t in s.items() if "fc1.w" in n})),
        r"is \[24, 48\], wanted \[48, 24\]",
    ),
    "linear instead of convolution": (
        edit_state("unet", UNET_FILE, lambda s: s.update({n: t.flatten(1) for n, t in s.items() if "proj_in.w" in n})),
        r"is \[16, 16\], wanted \[16, 16, 1, 1\]",
    ),
    "integers": (
        edit_state("unet", UNET_FILE, lambda s: s.update({n: t.to(torch.int8) for n, t in s.items() if "ff" in n})),
        "is I8; weights are read from F32, F16, BF16",
    ),
    "float8 of another kind": (
        edit_state("unet", UNET_FILE, lambda s: s.update({n: t.to(torch.float8_e4m3fnuz) for n, t in s.items()})),
        "is F8_E4M3FNUZ; weights are read from F32, F16, BF16, F64, F8_E4M3, F8_E5M2",
    ),
    "nan": (
        edit_state("vae", VAE_FILE, lambda s: s.update({"quant_conv.bias": torch.tensor([0.0] * 7 + [torch.nan])})),
        "'quant_conv.bias' holds NaN",
    ),
    "infinity": (
        edit_state("text", TEXT_FILE, lambda s: s.update({"final_layer_norm.bias": torch.full((24,), -torch.inf)})),
        "infinity",
    ),
    "old and new name": (
        edit_state(
            "vae",
            VAE_FILE,
            lambda s: s.update({"encoder.mid_block.attentions.0.query.bias": torch.zeros(16)}),
        ),
        "twice",
    ),
    "inpainting": (edit_state("unet", UNET_FILE, with_channels(9)), "inpainting variant"),
    "SD 2 unet": (edit_state("unet", UNET_FILE, with_context(1024)), "do not fit their config.json"),
    "SDXL unet": (edit_state("unet", UNET_FILE, with_context(2048)), "do not fit their config.json"),
    "vae in unet/": (lambda c, f: c.save(f / UNET_FILE, c.random_states()["vae"]), "holds no unet .found: vae"),
    "lora in unet/": (
        lambda c, f: c.save(f / UNET_FILE, {"unet.mid_block.to_q.lora_A.weight": torch.zeros(2, 2)}),
        "LoRA",
    ),
    "no unet file": (remove(UNET_FILE), "holds no diffusion_pytorch_model.safetensors"),
    "only a pickle": (rename(VAE_FILE, "vae/diffusion_pytorch_model.bin"), "a pickle; convert it to .safetensors"),
    "no vae folder": (rename("vae", "vae.old"), "holds no vae .*--vae FILE"),
    "no text encoder": (rename("text_encoder", "clip"), "holds no text .*text_encoder="),
    "lfs weights": (write(UNET_FILE, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "lfs config": (write("unet/config.json", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "no config": (remove("unet/config.json"), "config.json' cannot be read"),
    "config is no json": (write("vae/config.json", b"{"), "not JSON"),
    "config is a list": (write("vae/config.json", b"[]"), "JSON object"),
    "config is deep": (write("vae/config.json", b"[" * 100_000), "not JSON"),
    "config of another size": (rewrite_config("unet/config.json", layers_per_block=1), "do not fit their config.json"),
    "unknown setting": (rewrite_config("unet/config.json", new_feature=3), "new_feature"),
    "unknown schedule": (rewrite_config("scheduler/scheduler_config.json", beta_schedule="cosine"), "beta_schedule"),
    "widths disagree": (
        lambda c, f: c.write_folder(f, text=replace(c.REDUCED_TEXT, hidden_size=32)),
        "text encoder is 32 wide, the unet wants 24",
    ),
    "latents disagree": (
        lambda c, f: c.write_folder(f, vae=replace(c.REDUCED_VAE, latent_channels=6)),
        "the vae has 6",
    ),
    "own words without tokenizer": (
        lambda c, f: c.write_folder(f, text=replace(c.REDUCED_TEXT, vocab_size=50)),
        "brings no tokenizer",
    ),
    "empty tokenizer folder": (lambda c, f: (f / "tokenizer").mkdir(), "holds no tokenizer"),
    "vocabulary without merges": (write("tokenizer/vocab.json", b"{}"), "merges.txt"),
    "refiner unet": (edit_state("unet", UNET_FILE, with_context(1280)), "SDXL refiner file: pass the base model"),
    "second text encoder without weights": (
        lambda c, f: (f / "text_encoder_2").mkdir(), "text_encoder_2' holds no model.safetensors"
    ),
    "second text encoder too many": (
        lambda c, f: c.write_family_folder(f / "xl", "SDXL") and (f / "xl/text_encoder_2").rename(f / "text_encoder_2"),
        "a second text encoder, as SDXL has, but the unet reads one",
    ),
    "unCLIP folder": (lambda c, f: (f / "image_normalizer").mkdir(), "unCLIP"),
    "turbo": (
        rewrite_config(
            "scheduler/scheduler_config.json",
            _class_name="EulerAncestralDiscreteScheduler",
            timestep_spacing="trailing",
        ),
        "schedule of a turbo model: distilled to a few steps",
    ),
    "LCM": (rewrite_config("scheduler/scheduler_config.json", _class_name="LCMScheduler"), "distilled to a few steps"),
    "flow matching": (
        rewrite_config("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
        "'FlowMatchEulerDiscreteScheduler' is no schedule over betas",
    ),
    "SD 3 folder": (lambda c, f: (f / "transformer").mkdir(), "SD 3"),
    "index without map": (
        both(remove(UNET_FILE), write(f"{UNET_FILE}.index.json", {"a": 1})),
        "no weight_map",
    ),
    "index that climbs out": (
        both(
            remove(UNET_FILE),
            write(f"{UNET_FILE}.index.json", {"weight_map": {"conv_in.weight": "../vae/x.safetensors"}}),
        ),
        "not a plain file name",
    ),
    "index that promises more": (
        both(
            rename(UNET_FILE, "unet/a.safetensors"),
            write(f"{UNET_FILE}.index.json", {"weight_map": {"absent": "a.safetensors"}}),
        ),
        "lists 1 tensors that its files do not hold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_faulty_folder_is_refused_in_one_line(checkpoints: ModuleType, folder: Path, name: str) -> None:
    fault, reason = BAD_FOLDERS[name]
    fault(checkpoints, folder)
    with pytest.raises(InputError, match=reason) as caught:
        load_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_a_reduced_single_file_is_not_guessed_at(checkpoints: ModuleType, tmp_path: Path) -> None:
    checkpoints.write_ldm(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"do not fit Stable Diffusion 1\.x: .*missing"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("runwayml/stable-diffusion-v1-5", "nothing is ever downloaded"),
        ("absent.safetensors", "neither a file nor a folder"),
        ("x" * 5000, "not a usable path|neither a file"),
        ("a\x00b", "not a usable path|neither a file"),
        (".", "not a diffusers folder"),
    ],
)
def test_a_path_that_is_none(model: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        load_checkpoint(model)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_missing_parts_are_supplied_from_files(checkpoints: ModuleType, tmp_path: Path) -> None:
    """A file with the unet alone, in three spellings, becomes a checkpoint with a VAE file and a text encoder file."""
    listing = checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT)
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}
    files = {}
    for part, prefix in prefixes.items():
        prefixed = {name: entry for name, entry in listing.items() if name.startswith(prefix)}
        bare = {name.removeprefix(prefix): entry for name, entry in prefixed.items()}
        for style, keys in (("prefixed", prefixed), ("bare", bare)):
            files[part, style] = tmp_path / f"{part}_{style}.safetensors"
            checkpoints.write_hollow(files[part, style], keys)
    with pytest.raises(InputError, match=r"holds no vae and no text .*--vae FILE.*text_encoder="):
        load_checkpoint(files["unet", "bare"])
    with pytest.raises(InputError, match=r"holds the vae only.*--vae"):
        load_checkpoint(files["vae", "bare"])
    for style in ("prefixed", "bare"):
        checkpoint = load_checkpoint(files["unet", style], vae=files["vae", style], text_encoder=files["text", style])
        assert len(checkpoint.unet) + len(checkpoint.vae) + len(checkpoint.text) == 1130
    with pytest.raises(InputError, match=r"holds no vae .found: text"):
        load_checkpoint(files["unet", "bare"], vae=files["text", "bare"])
    folder = tmp_path / "sdxl_vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(replace(SD15_VAE, scaling_factor=0.13025))))
    checkpoints.write_hollow(folder / "diffusion_pytorch_model.safetensors", {
        name: ("F16", shape) for name, shape in checkpoints.vae_shapes(SD15_VAE).items()
    })  # fmt: skip
    with pytest.raises(InputError, match=r"scaling_factor 0.13025 belongs to another family"):
        load_checkpoint(files["unet", "bare"], vae=folder, text_encoder=files["text", "bare"])


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_tokenizer_folders(folder: Path, tmp_path: Path, files: tuple[str, ...]) -> None:
    for place in (folder / "tokenizer", tmp_path / "words"):
        place.mkdir()
        for file in files:
            (place / file).write_text("{}")
    assert load_checkpoint(folder).tokenizer == folder / "tokenizer"
    assert load_checkpoint(folder, tokenizer=tmp_path / "words").tokenizer == tmp_path / "words"
    with pytest.raises(InputError, match=r"holds no tokenizer"):
        load_checkpoint(folder, tokenizer=tmp_path)


def test_prediction_type_of_a_folder(checkpoints: ModuleType, folder: Path) -> None:
    assert load_checkpoint(folder).schedule_config.prediction_type == "epsilon"
    for spelling in ("v", "v_prediction"):
        assert load_checkpoint(folder, prediction_type=spelling).schedule_config.prediction_type == "v_prediction"
    with pytest.raises(InputError, match="choices are eps and v"):
        load_checkpoint(folder, prediction_type="sample")
    checkpoints.write_folder(folder, schedule=replace(SD15_SCHEDULE, prediction_type="v_prediction"))
    assert load_checkpoint(folder).schedule_config.prediction_type == "v_prediction"
    assert load_checkpoint(folder, prediction_type="eps").schedule_config.prediction_type == "epsilon"


def test_prediction_type_of_a_single_file(checkpoints: ModuleType, tmp_path: Path) -> None:
    """Metadata or a marker tensor may say it; nothing else in the file can."""
    path = tmp_path / "x.safetensors"
    configs = {"unet": checkpoints.REDUCED_UNET, "vae": checkpoints.REDUCED_VAE, "text": checkpoints.REDUCED_TEXT}

    def schedule() -> ScheduleConfig:
        return survey_file(path, configs=configs).schedule

    checkpoints.write_ldm(path)
    assert schedule() == SD15_SCHEDULE
    checkpoints.write_ldm(path, metadata={"modelspec.prediction_type": "v"})
    assert schedule().prediction_type == "v_prediction"
    state = checkpoints.ldm_state(checkpoints.random_states(), checkpoints.REDUCED_UNET, checkpoints.REDUCED_VAE)
    checkpoints.save(path, state | {"v_pred": torch.zeros(0)})
    assert schedule().prediction_type == "v_prediction"
    assert not schedule().rescale_betas_zero_snr
    for markers in ("ztsnr",), ("v_pred", "ztsnr"):
        checkpoints.save(path, state | {marker: torch.zeros(0) for marker in markers})
        assert schedule() == replace(SD15_SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True)


def test_a_folder_says_what_it_does_not_take_from_the_scheduler(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text()) | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    checkpoint = load_checkpoint(folder)
    assert checkpoint.schedule_config.rescale_betas_zero_snr
    assert sum("timestep_spacing = 'trailing' concern another sampler" in note for note in checkpoint.notes) == 1


def test_no_scheduler_config_means_stable_diffusion_1(folder: Path) -> None:
    (folder / "scheduler/scheduler_config.json").unlink()
    checkpoint = load_checkpoint(folder)
    assert checkpoint.schedule_config == SD15_SCHEDULE
    assert any("no scheduler config" in note for note in checkpoint.notes)


def test_defaults_are_passed_on(folder: Path) -> None:
    (folder / "ledits.json").write_text('{"num_steps": 40}')
    assert load_checkpoint(folder).defaults == {"num_steps": 40}

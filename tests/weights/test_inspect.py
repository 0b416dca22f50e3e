"""The report names family, parts and verdict of every kind of file, from the header alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ledits_min.config import SD15_TEXT, SD15_UNET, SD15_VAE
from ledits_min.errors import InputError
from ledits_min.weights.inspect import inspect
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.read.identify import ANY_VAE
from ledits_min.weights.read.survey import TINY

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
Listing = dict[str, Any]


@pytest.fixture(scope="module")
def sd15(checkpoints: ModuleType) -> Listing:
    """A whole Stable Diffusion 1.5 single file, by rule."""
    listing: Listing = checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT)
    return listing


def only(listing: Listing, *prefixes: str) -> Listing:
    return {name: entry for name, entry in listing.items() if name.startswith(prefixes)}


def bare(listing: Listing, prefix: str) -> Listing:
    return {name.removeprefix(prefix): entry for name, entry in only(listing, prefix).items()}


def with_shape(listing: Listing, ending: str, axis: int, size: int) -> Listing:
    """Every tensor whose name ends so, with another size along one axis."""
    result = dict(listing)
    for name, (dtype, shape) in listing.items():
        if name.endswith(ending):
            result[name] = (dtype, tuple(size if i == axis else n for i, n in enumerate(shape)))
    assert result != listing
    return result


def channels(listing: Listing, count: int) -> Listing:
    return with_shape(listing, "input_blocks.0.0.weight", 1, count)


def linear(listing: Listing) -> Listing:
    """SD 2 and SDXL project with linear layers."""
    return {
        name: (dtype, shape[:2] if ".proj_in.weight" in name or ".proj_out.weight" in name else shape)
        for name, (dtype, shape) in listing.items()
    }


def context(listing: Listing, width: int) -> Listing:
    return linear(with_shape(with_shape(listing, "attn2.to_k.weight", 1, width), "attn2.to_v.weight", 1, width))


def as_dtype(listing: Listing, dtype: str, ending: str = "") -> Listing:
    return {n: (dtype if n.endswith(ending) else old, shape) for n, (old, shape) in listing.items()}


OPENCLIP = {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": ("F16", (1024,))}
SGM = {"conditioner.embedders.1.model.ln_final.weight": ("F16", (1280,))}
BUFFERS = {"betas": ("F32", (1000,)), "model_ema.decay": ("F32", ())}

# name -> (how the listing is made from SD 1.5's, family, verdict, words of the reason)
GENERATED: dict[str, tuple[Any, str, str, str]] = {
    "whole": (lambda sd: sd, "SD 1.x", "loads", ""),
    "whole with buffers": (lambda sd: sd | BUFFERS, "SD 1.x", "loads", ""),
    "fp32": (lambda sd: as_dtype(sd, "F32"), "SD 1.x", "loads", ""),
    "bf16": (lambda sd: as_dtype(sd, "BF16"), "SD 1.x", "loads", ""),
    "with EMA": (
        lambda sd: sd | {"model_ema." + n[6:].replace(".", ""): e for n, e in only(sd, UNET).items()},
        "SD 1.x",
        "loads",
        "",
    ),
    "inpainting": (lambda sd: channels(sd, 9), "SD 1.x inpainting", "refused", "inpainting"),
    "pix2pix": (lambda sd: channels(sd, 8), "SD 1.x instruct-pix2pix", "refused", "instruct-pix2pix"),
    "depth": (
        lambda sd: channels(context(sd, 1024), 5) | OPENCLIP,
        "SD 2.x depth-to-image",
        "refused",
        "depth-to-image",
    ),
    "SD 2's unet with a rest of a text encoder": (
        lambda sd: context(only(sd, UNET, VAE), 1024) | OPENCLIP,
        "SD 2.x",
        "refused",
        "the text tensors do not fit Stable Diffusion 2.x",
    ),
    "SDXL's context in SD 1's unet": (
        lambda sd: context(only(sd, UNET, VAE), 2048) | SGM,
        "SDXL",
        "refused",
        "the unet tensors do not fit Stable Diffusion XL",
    ),
    "refiner": (
        lambda sd: (
            context(only(sd, UNET, VAE), 1280) | {"conditioner.embedders.0.model.ln_final.bias": ("F16", (1280,))}
        ),
        "SDXL refiner",
        "refused",
        "pass the base model",
    ),
    "refiner's unet": (lambda sd: context(only(sd, UNET), 1280), "SDXL refiner", "refused", "pass the base model"),
    "unCLIP": (
        lambda sd: context(only(sd, UNET, VAE), 1024) | {"noise_augmentor.data_mean": ("F32", (1, 1024))},
        "SD 2.x unCLIP",
        "refused",
        "told a picture",
    ),
    "Playground": (
        lambda sd: sd | {"edm_mean": ("F32", (4,))},
        "SDXL with EDM noise levels",
        "refused",
        "Playground 2.5",
    ),
    "Stable Cascade": (
        lambda sd: {"clip_txt_mapper.weight": ("F16", (2048, 1280))},
        "Stable Cascade",
        "refused",
        "supported are",
    ),
    "no VAE": (lambda sd: only(sd, UNET, TEXT), "SD 1.x", "incomplete", "--vae FILE"),
    "no text encoder": (lambda sd: only(sd, UNET, VAE), "SD 1.x", "incomplete", "text_encoder="),
    "UNet alone": (lambda sd: only(sd, UNET), "SD 1.x", "incomplete", "--vae FILE"),
    "bare UNet": (lambda sd: bare(sd, UNET), "SD 1.x", "incomplete", "--vae FILE"),
    "VAE alone": (lambda sd: only(sd, VAE), ANY_VAE, "part", "this file as --vae"),
    "bare VAE": (lambda sd: bare(sd, VAE), ANY_VAE, "part", "this file as --vae"),
    "text alone": (lambda sd: bare(sd, TEXT), "SD 1.x or SDXL", "part", "this file as --text-encoder"),
    "16-channel VAE": (
        lambda sd: with_shape(bare(sd, VAE), "decoder.conv_in.weight", 1, 16),
        "SD 3 or Flux",
        "refused",
        "not supported; supported are",
    ),
    "one tensor missing": (
        lambda sd: {n: e for n, e in sd.items() if not n.endswith("time_embed.0.bias")},
        "SD 1.x",
        "refused",
        "1 missing ('time_embedding.linear_1.bias')",
    ),
    "a tensor too many": (
        lambda sd: sd | {f"{UNET}extra": ("F16", (3,))},
        "SD 1.x",
        "refused",
        "1 unexpected ('extra')",
    ),
    "fp8": (lambda sd: as_dtype(sd, "F8_E4M3", "to_q.weight"), "SD 1.x", "loads", ""),
    "fp8 that is an exponent alone": (
        lambda sd: as_dtype(sd, "F8_E8M0", "to_q.weight"),
        "SD 1.x",
        "refused",
        "F8_E8M0; weights are read from F32, F16, BF16, F64, F8_E4M3, F8_E5M2",
    ),
    "scaled fp8": (
        lambda sd: as_dtype(sd, "F8_E4M3", "to_q.weight") | {f"{UNET}scaled_fp8": ("F8_E4M3", (0,))},
        "SD 1.x",
        "refused",
        "scaled fp8",
    ),
    "fp8 with scales": (
        lambda sd: sd | {f"{UNET}input_blocks.0.0.scale_weight": ("F32", ())},
        "SD 1.x",
        "refused",
        "scaled fp8",
    ),
    "EMA alone": (
        lambda sd: (
            only(sd, VAE, TEXT)
            | {"model_ema." + n[6:].replace(".", ""): e for n, e in only(sd, UNET).items()}
            | BUFFERS
        ),
        "SD 1.x",
        "loads",
        "",
    ),
    "integers": (lambda sd: as_dtype(sd, "I8", "to_q.weight"), "SD 1.x", "refused", "I8"),
    "another size": (
        lambda sd: with_shape(sd, "input_blocks.0.0.weight", 0, 192),
        "SD 1.x",
        "refused",
        "is [192, 4, 3, 3], wanted [320, 4, 3, 3]",
    ),
    "kohya LoRA": (
        lambda sd: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": ("F16", (4, 320, 1, 1))},
        "LoRA",
        "refused",
        "only changes another checkpoint",
    ),
    "LyCORIS": (lambda sd: {"a.hada_w1_a": ("F16", (4, 320))}, "LoRA", "refused", "only changes another checkpoint"),
    "ControlNet": (
        lambda sd: {"control_model.input_blocks.0.0.weight": ("F16", (320, 4, 3, 3))},
        "ControlNet",
        "refused",
        "only steers",
    ),
    "textual inversion": (lambda sd: {"emb_params": ("F32", (4, 768))}, "textual inversion", "refused", "not a model"),
    "Flux": (
        lambda sd: {"double_blocks.0.img_attn.qkv.weight": ("BF16", (9216, 3072))},
        "Flux",
        "refused",
        "supported are Stable Diffusion 1.x",
    ),
    "Flux in diffusers": (
        lambda sd: {"single_transformer_blocks.0.attn.to_q.weight": ("BF16", (3072, 3072))},
        "Flux",
        "refused",
        "supported are",
    ),
    "SD 3": (
        lambda sd: {f"{UNET}joint_blocks.0.context_block.attn.qkv.weight": ("F16", (4608, 1536))},
        "SD 3",
        "refused",
        "supported are",
    ),
    **{
        family: (lambda sd, name=name: {name: ("BF16", (64, 64))}, family, "refused", "not supported; supported are")
        for family, name in (
            ("PixArt", "t_block.1.weight"),
            ("Hunyuan-DiT", "mlp_t5.0.weight"),
            ("AuraFlow", "model.double_layers.0.attn.w1q.weight"),
            ("Lumina", f"{UNET}cap_embedder.1.weight"),
            ("Qwen-Image", "transformer_blocks.0.img_mod.1.weight"),
            ("Wan", f"{UNET}head.modulation"),
        )
    },
    "saved inversion": (
        lambda sd: {"residuals": ("F32", (3, 1, 4, 8, 8)), "x_T": ("F32", (1, 4, 8, 8))},
        "saved inversion",
        "refused",
        "where the picture goes",
    ),
    "something else": (lambda sd: {"layer.weight": ("F32", (3, 3))}, "unknown", "refused", "'layer.weight'"),
}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_listings(checkpoints: ModuleType, sd15: Listing, tmp_path: Path, name: str) -> None:
    make, family, verdict, reason = GENERATED[name]
    path = tmp_path / "x.safetensors"
    checkpoints.write_hollow(path, make(sd15))
    report = inspect(path)
    assert (report.family, report.verdict) == (family, verdict)
    assert reason in report.reason
    assert all(line.isprintable() for line in str(report).splitlines())
    assert report.size == path.stat().st_size


# file stem -> (family, verdict); what each published file is.
PUBLISHED = {
    "diffusers_vae_fp16_ambiguous": (ANY_VAE, "part"),
    "hf_text_encoder_flat_v5_f32": ("SD 1.x or SDXL", "part"),
    "lora_diffusers_old_sd15_unet_attn": ("LoRA", "refused"),
    "lora_kohya_sd1_te_alpha": ("LoRA", "refused"),
    "lora_kohya_sd1_te_noalpha": ("LoRA", "refused"),
    "lora_kohya_sd1_unet_alpha": ("LoRA", "refused"),
    "lora_kohya_sd1_unet_noalpha": ("LoRA", "refused"),
    "lora_peft_sd15_unet_attn": ("LoRA", "refused"),
    "sd15_diffusers_unet_f32": ("SD 1.x", "incomplete"),
    "sd15_diffusers_unet_inpaint_9ch": ("SD 1.x inpainting", "refused"),
    "sd15_diffusers_vae_old_f32": (ANY_VAE, "part"),
    "sd15_hf_text_encoder_f32_pid": ("SD 1.x or SDXL", "part"),
    "sd15_ldm_community_fp16_merge": ("SD 1.x", "loads"),
    "sd15_ldm_emaonly": ("SD 1.x", "loads"),
    "sd15_ldm_inpainting_9ch": ("SD 1.x inpainting", "refused"),
    "sd15_ldm_no_vae": ("SD 1.x", "incomplete"),
    "sd15_ldm_pruned_with_ema": ("SD 1.x", "loads"),
    "sd15_ldm_unet_only_prefixed": ("SD 1.x", "incomplete"),
    "sd21_diffusers_unet_f32": ("SD 2.x", "incomplete"),
    "sd21_hf_text_encoder_f32_pid": ("SD 2.x", "part"),
    "sd21_ldm_ema_pruned": ("SD 2.x", "loads"),
    "sd2_ldm_inpainting_9ch": ("SD 2.x inpainting", "refused"),
    "sdxl_base_1_0_sgm": ("SDXL", "loads"),
    "sdxl_diffusers_unet_f16": ("SDXL", "incomplete"),
    "sdxl_diffusers_vae_new_f32": (ANY_VAE, "part"),  # no header tells an SDXL VAE from the others
    "sdxl_hf_text_encoder_2_f16": ("SDXL", "part"),
    "sdxl_hf_text_encoder_f32_nopid": ("SD 1.x or SDXL", "part"),  # the same CLIP
    "sdxl_vae_ldm_bare": (ANY_VAE, "part"),
    "vae_ldm_prefixed": (ANY_VAE, "part"),
}
# Parameters of each part as its publishers count them, by family; OpenCLIP's single files hold a layer nobody reads.
WHOLE = {"vae": (83_653_863,), "text": (123_060_480, 340_387_840, 354_032_641), "text_2": (694_659_840, 694_659_841)}
WHOLE_UNETS = {"SD 1.x": 859_520_964, "SD 2.x": 865_910_724, "SDXL": 2_567_463_684}


def test_every_published_listing(checkpoints: ModuleType, layouts: dict[str, Any], tmp_path: Path) -> None:
    assert set(layouts) <= set(PUBLISHED), "a listing without a verdict here"
    path = tmp_path / "x.safetensors"
    for name, layout in layouts.items():
        checkpoints.write_hollow(path, layout["keys"], layout.get("metadata"))
        report = inspect(path)
        assert (report.family, report.verdict) == PUBLISHED[name], name
        if report.verdict != "refused":
            for part in report.parts:
                whole = (WHOLE_UNETS[report.family],) if part.name == "unet" else WHOLE[part.name]
                assert part.parameters in whole, name


# What lacks a part loads with the parts that its report asks for, and a part loads where its report sends it.
SUPPLIED = {
    "sd15_diffusers_unet_f32": {"vae": "vae_ldm_prefixed", "text_encoder": "sd15_hf_text_encoder_f32_pid"},
    "sd15_ldm_no_vae": {"vae": "sd15_diffusers_vae_old_f32"},
    "sd15_ldm_unet_only_prefixed": {
        "vae": "diffusers_vae_fp16_ambiguous",
        "text_encoder": "hf_text_encoder_flat_v5_f32",
    },
    "sd21_diffusers_unet_f32": {"vae": "vae_ldm_prefixed", "text_encoder": "sd21_hf_text_encoder_f32_pid"},
    "sdxl_diffusers_unet_f16": {"vae": "sdxl_vae_ldm_bare", "text_encoder": "sdxl_base_1_0_sgm"},
}
RECEIVES = {"SD 1.x or SDXL": "sd15_ldm_emaonly", "SD 2.x": "sd21_ldm_ema_pruned", "SDXL": "sdxl_base_1_0_sgm"}


def test_what_a_report_asks_for_is_what_is_missing(
    checkpoints: ModuleType, layouts: dict[str, Any], tmp_path: Path
) -> None:
    def hollow(name: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        if not path.exists():
            checkpoints.write_hollow(path, layouts[name]["keys"], layouts[name].get("metadata"))
        return path

    assert {name for name, (_, verdict) in PUBLISHED.items() if verdict == "incomplete"} == set(SUPPLIED)
    for name, (family, verdict) in PUBLISHED.items():
        report, path = inspect(hollow(name)), hollow(name)
        if verdict == "incomplete":
            asked = {option for option in ("vae", "text_encoder") if f"--{option.replace('_', '-')}" in report.reason}
            assert asked == set(SUPPLIED[name]), name
            whole = inspect(path, **{option: hollow(part) for option, part in SUPPLIED[name].items()})
            assert (whole.verdict, whole.missing) == ("loads", ()), name
            assert "missing" not in str(whole) and str(report).count("missing   ") == len(report.missing)
        elif verdict == "part":
            option = "vae" if "--vae" in report.reason else "text_encoder"
            receiver = hollow(RECEIVES.get(family, "sd15_ldm_no_vae"))
            assert inspect(receiver, **{option: path}).verdict == "loads", name
        elif family == "LoRA":
            assert "--lora" in report.reason and inspect(hollow("sd15_ldm_emaonly"), lora=path).verdict == "loads", name


def test_numbers_and_notes(checkpoints: ModuleType, sd15: Listing, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ids = {f"{TEXT}text_model.embeddings.position_ids": ("I64", (1, 77))}
    ema = {"model_ema." + name[6:].replace(".", ""): entry for name, entry in only(sd15, UNET).items()}
    listing = as_dtype(sd15, "F32", "norm1.weight") | ids | ema | BUFFERS | {"thumbnail": ("F32", (3,))}
    checkpoints.write_hollow(path, listing, {"format": "pt"})
    report = inspect(path)
    assert report.dialect == "LDM single file"
    assert [(p.name, p.tensors, p.parameters) for p in report.parts] == [
        ("unet", 686, 859_520_964),
        ("vae", 248, 83_653_863),
        ("text", 196, 123_060_480),
    ]
    assert sum(report.parts[0].dtypes.values()) == 686 and set(report.parts[0].dtypes) == {"F16", "F32"}
    notes = "\n".join(report.oddities)
    for words in ("686 tensors, EMA copy", "training buffers", "1 tensor, position_ids", "'thumbnail'", "mixed dtypes"):
        assert words in notes
    assert "859,520,964 parameters in 686 tensors" in str(report)


def test_folders(checkpoints: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    checkpoints.write_folder(folder, old_vae_names=True, text_layout="prefixed+ids")
    report = inspect(folder)
    assert (report.dialect, report.verdict, report.missing) == ("diffusers folder", "loads", ())
    assert "old names" in "\n".join(report.oddities) and "text_model." in "\n".join(report.oddities)
    (folder / "vae").rename(tmp_path / "elsewhere")
    report = inspect(folder)
    assert (report.verdict, report.missing) == ("incomplete", ("vae",))
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"class_embed_type": "timestep"}))
    report = inspect(folder)
    assert report.verdict == "refused" and "class_embed_type" in report.reason
    assert [part.name for part in report.parts] == ["unet", "text"]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    report = inspect(tmp_path)
    assert report.verdict == "refused" and "not a diffusers folder" in report.reason


def test_no_header_no_report(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"<html>")
    for path in (tmp_path / "x.safetensors", tmp_path / "absent"):
        with pytest.raises(InputError):
            inspect(path)


def test_no_weight_is_read_and_torch_is_not_needed(checkpoints: ModuleType, sd15: Listing, tmp_path: Path) -> None:
    """A file of 4 GB is described by a process that may not hold half a GB and never imports torch."""
    path = tmp_path / "x.safetensors"
    checkpoints.write_hollow(path, as_dtype(sd15, "F32"))
    assert path.stat().st_size > 4e9
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)); "
        "from ledits_min.weights.inspect import inspect; print(inspect(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert "verdict   loads" in done.stdout


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("unet", "is the UNet of a checkpoint"),
        ("unet/diffusion_pytorch_model.safetensors", "is the UNet of a checkpoint"),
        ("vae", "as --vae"),
        ("vae/diffusion_pytorch_model.safetensors", "as --vae"),
        ("text_encoder", "as --text-encoder"),
        ("text_encoder/model.safetensors", "as --text-encoder"),
        ("tokenizer", "as --tokenizer"),
        ("scheduler", "is the scheduler of a checkpoint"),
    ],
)
def test_a_lone_part_says_where_it_belongs(part: str, said: str) -> None:
    report = inspect(TINY / part)
    assert report.verdict == "part"
    assert said in report.reason
    assert report.reason.endswith(f"; the whole checkpoint is '{TINY.resolve()}'")
    name = {"unet": "unet", "vae": "vae", "text_encoder": "text"}.get(part.split("/")[0])
    assert [one.name for one in report.parts] == ([name] if name else [])


def test_a_lone_part_far_from_its_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(TINY / "vae", tmp_path / "my-vae")
    report = inspect(tmp_path / "my-vae")
    assert report.verdict == "part"
    assert report.reason.endswith("this as --vae (vae=)")
    with pytest.raises(InputError, match="as --vae"):
        load_checkpoint(tmp_path / "my-vae")
    (tmp_path / "my-vae/config.json").write_text('{"_class_name": "Other"}')
    assert inspect(tmp_path / "my-vae").verdict == "refused"


def test_the_size_that_a_model_knows(tmp_path: Path) -> None:
    assert inspect("tiny").pixels == "trained at 128 x 128 alone; of other pictures it is given a square"
    shutil.copytree(TINY, tmp_path / "m")
    (tmp_path / "m/ledits.json").unlink()
    assert inspect(tmp_path / "m").pixels == "trained at 128 x 128"

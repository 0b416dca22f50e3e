"""Every dialect of one random model loads as the same tensors, without a copy, and has a fingerprint."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ledits_min.config import SD15_SCHEDULE, SD15_TEXT, SD15_UNET, SD15_VAE
from ledits_min.errors import InputError
from ledits_min.files.header import read_header
from ledits_min.text import build_text_model
from ledits_min.unet import UNet
from ledits_min.vae import VAE
from ledits_min.weights.load import Checkpoint, fetch, load_checkpoint
from ledits_min.weights.read.survey import check_complete, survey_file

UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def load_ldm(checkpoints: ModuleType, path: Path) -> Checkpoint:
    """A reduced LDM file; the public entry point demands the full size of it."""
    configs = {"unet": checkpoints.REDUCED_UNET, "vae": checkpoints.REDUCED_VAE, "text": checkpoints.REDUCED_TEXT}
    survey = survey_file(path, configs=configs)
    check_complete(survey)
    return fetch(survey)


def assert_same(
    checkpoint: Checkpoint, states: dict[str, dict[str, Tensor]], dtype: torch.dtype = torch.float32
) -> None:
    for part in ("unet", "vae", "text"):
        found, wanted = getattr(checkpoint, part), states[part]
        assert sorted(found) == sorted(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.parametrize("old_vae_names", [False, True])
@pytest.mark.parametrize("text_layout", ["flat", "prefixed", "prefixed+ids"])
def test_every_folder_dialect(checkpoints: ModuleType, tmp_path: Path, old_vae_names: bool, text_layout: str) -> None:
    states = checkpoints.write_folder(tmp_path, old_vae_names=old_vae_names, text_layout=text_layout)
    checkpoint = load_checkpoint(tmp_path)
    assert_same(checkpoint, states)
    assert (checkpoint.unet_config, checkpoint.vae_config) == (checkpoints.REDUCED_UNET, checkpoints.REDUCED_VAE)
    assert checkpoint.text_config == checkpoints.REDUCED_TEXT
    assert checkpoint.tokenizer is None and checkpoint.defaults == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position_ids", [None, torch.arange(77)[None], torch.full((1, 77), 74.9975)])
def test_every_ldm_dialect(
    checkpoints: ModuleType, tmp_path: Path, dtype: torch.dtype, position_ids: Tensor | None
) -> None:
    path = tmp_path / "model.safetensors"
    states = checkpoints.write_ldm(path, dtype=dtype, ema=True, buffers=True, position_ids=position_ids)
    checkpoint = load_ldm(checkpoints, path)
    assert_same(checkpoint, states, dtype)
    assert any("EMA copy" in note for note in checkpoint.notes)


def test_the_modules_take_the_weights_strictly(checkpoints: ModuleType, tmp_path: Path) -> None:
    """As the pipeline does it: built on the meta device, the mapped tensors assigned, strict both ways."""
    checkpoints.write_ldm(tmp_path / "x.safetensors")
    checkpoint = load_ldm(checkpoints, tmp_path / "x.safetensors")
    for build, state in (
        (lambda: UNet(checkpoint.unet_config), checkpoint.unet),
        (lambda: VAE(checkpoint.vae_config), checkpoint.vae),
        (lambda: build_text_model(checkpoint.text_config), checkpoint.text),
    ):
        with torch.device("meta"):
            module: torch.nn.Module = build()
        module.load_state_dict(state, strict=True, assign=True)
        for name, parameter in module.named_parameters():
            assert parameter.data_ptr() == state[name].data_ptr()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mappings is Linux's")
def test_tensors_stay_in_the_file(checkpoints: ModuleType, tmp_path: Path) -> None:
    """Every tensor's bytes lie inside a mapping of the file: nothing was copied."""
    path = tmp_path / "x.safetensors"
    checkpoints.write_ldm(path)
    checkpoint = load_ldm(checkpoints, path)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(edge, 16) for edge in line.split()[0].split("-")) for line in lines]
    for tensor in (*checkpoint.unet.values(), *checkpoint.vae.values(), *checkpoint.text.values()):
        start = tensor.data_ptr()
        assert any(low <= start and start + tensor.nbytes <= high for low, high in ranges)


def test_an_unaligned_header_is_harmless(checkpoints: ModuleType, tmp_path: Path) -> None:
    """Published files exist whose header is not padded, so that no tensor starts at a multiple of its item size."""
    path = tmp_path / "x.safetensors"
    states = checkpoints.write_ldm(path)
    raw, header = path.read_bytes(), read_header(path)
    body = raw[8 : header.data_start].rstrip()
    body += b" " * ((3 - len(body)) % 4)
    path.write_bytes(len(body).to_bytes(8, "little") + body + raw[header.data_start :])
    assert read_header(path).data_start % 4 == 3
    checkpoint = load_ldm(checkpoints, path)
    assert_same(checkpoint, states)
    image = torch.randn(1, 3, 16, 16)
    for state in (checkpoint.vae, states["vae"]):
        with torch.device("meta"):
            vae = VAE(checkpoints.REDUCED_VAE)
        vae.load_state_dict(state, strict=True, assign=True)
        with torch.no_grad():
            latents = vae.encode(image)
        if state is checkpoint.vae:
            unaligned = latents
    assert torch.equal(latents, unaligned)


def test_full_size_ldm_file(checkpoints: ModuleType, tmp_path: Path) -> None:
    """Through the public door, with every name and shape of Stable Diffusion 1.5; the zeros take no disk."""
    path = tmp_path / "x.safetensors"
    checkpoints.write_hollow(path, checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT, "F16"))
    checkpoint = load_checkpoint(path)
    assert (len(checkpoint.unet), len(checkpoint.vae), len(checkpoint.text)) == (686, 248, 196)
    assert sum(t.numel() for part in (checkpoint.unet, checkpoint.vae, checkpoint.text) for t in part.values()) == (
        859_520_964 + 83_653_863 + 123_060_480
    )
    assert checkpoint.schedule_config == SD15_SCHEDULE
    assert any("zero" in note for note in checkpoint.notes)


def test_float64_is_cast_with_a_note(checkpoints: ModuleType, tmp_path: Path) -> None:
    states = checkpoints.write_folder(tmp_path, dtype=torch.float64)
    checkpoint = load_checkpoint(tmp_path)
    assert_same(checkpoint, states)
    assert sum("cast to float32" in note for note in checkpoint.notes) == 3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_exactly_as_float16(checkpoints: ModuleType, tmp_path: Path, dtype: torch.dtype) -> None:
    """Both kinds fit float16; torch itself writes the files, in both dialects."""
    states = checkpoints.write_folder(tmp_path / "folder", dtype=dtype)
    checkpoints.write_ldm(tmp_path / "x.safetensors", dtype=dtype, position_ids=torch.arange(77)[None])
    for checkpoint in (load_checkpoint(tmp_path / "folder"), load_ldm(checkpoints, tmp_path / "x.safetensors")):
        for part in ("unet", "vae", "text"):
            for name, tensor in states[part].items():
                found = getattr(checkpoint, part)[name]
                assert found.dtype == torch.float16 and torch.equal(found.float(), tensor.to(dtype).float()), name
        assert (
            sum(f"{str(dtype).removeprefix('torch.')} tensors are cast to float16" in n for n in checkpoint.notes) == 3
        )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_in_float8_is_found(checkpoints: ModuleType, tmp_path: Path, dtype: torch.dtype) -> None:
    states = checkpoints.random_states()
    states["unet"]["conv_in.bias"] = torch.full_like(states["unet"]["conv_in.bias"], torch.nan)
    checkpoints.write_folder(tmp_path, states=states, dtype=dtype)
    with pytest.raises(InputError, match="'conv_in.bias' holds NaN or infinity"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("marker", ["model.diffusion_model.scaled_fp8", "scaled_fp8"])
def test_scaled_float8_is_refused_by_name(checkpoints: ModuleType, tmp_path: Path, marker: str) -> None:
    """Without the factors beside them such weights are far too large; a file that brings factors is not guessed at."""
    state = checkpoints.ldm_state(checkpoints.random_states(), checkpoints.REDUCED_UNET, checkpoints.REDUCED_VAE)
    scales = {f"{name.removesuffix('.weight')}.scale_weight": torch.ones(()) for name in state if "attn1.to_q" in name}
    for extra in (scales, {marker: torch.ones(2)}):
        checkpoints.save(tmp_path / "x.safetensors", state | extra, torch.float8_e4m3fn)
        with pytest.raises(InputError, match="scaled fp8 .* is not supported; pass its float16 version"):
            load_ldm(checkpoints, tmp_path / "x.safetensors")


def test_mixed_dtypes_are_kept_with_a_note(checkpoints: ModuleType, folder: Path) -> None:
    state = checkpoints.random_states()["unet"]
    state["conv_in.weight"] = state["conv_in.weight"].half()
    checkpoints.save_file(state, folder / UNET_FILE)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.unet["conv_in.weight"].dtype == torch.float16
    assert [note.partition(" (")[0] for note in checkpoint.notes if "mixed" in note] == ["unet: mixed dtypes"]


def test_variants_in_the_documented_order(checkpoints: ModuleType, tmp_path: Path) -> None:
    half = checkpoints.write_folder(tmp_path, variant="fp16", dtype=torch.float16)
    checkpoint = load_checkpoint(tmp_path)
    assert_same(checkpoint, half, torch.float16)
    assert any("model.fp16.safetensors is used" in note for note in checkpoint.notes)
    full = checkpoints.write_folder(tmp_path, seed=1)
    checkpoint = load_checkpoint(tmp_path)
    assert_same(checkpoint, full)
    assert any("also there: model.fp16.safetensors" in note for note in checkpoint.notes)


def test_shards(checkpoints: ModuleType, folder: Path) -> None:
    states = checkpoints.random_states()
    names = sorted(states["unet"])
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    (folder / UNET_FILE).unlink()
    for file, keys in shards.items():
        checkpoints.save(folder / "unet" / file, {name: states["unet"][name] for name in keys})
    index = {"weight_map": {name: file for file, keys in shards.items() for name in keys}}
    (folder / f"{UNET_FILE}.index.json").write_text(json.dumps(index))
    assert_same(load_checkpoint(folder), states)


def test_parts_from_elsewhere(checkpoints: ModuleType, tmp_path: Path) -> None:
    """vae= and text_encoder= take a part's own folder or a whole one, and what they replace is not looked at."""
    first = checkpoints.write_folder(tmp_path / "a")
    second = checkpoints.write_folder(tmp_path / "b", seed=1, old_vae_names=True)
    (tmp_path / "a" / VAE_FILE).write_bytes(b"damaged")
    checkpoint = load_checkpoint(tmp_path / "a", vae=tmp_path / "b", text_encoder=tmp_path / "b/text_encoder")
    assert_same(checkpoint, {"unet": first["unet"], "vae": second["vae"], "text": second["text"]})
    assert sum("taken from" in note for note in checkpoint.notes) == 2


def test_foreign_tensors_beside_the_parts_are_named(checkpoints: ModuleType, tmp_path: Path) -> None:
    state = checkpoints.ldm_state(checkpoints.random_states(), checkpoints.REDUCED_UNET, checkpoints.REDUCED_VAE)
    checkpoints.save(tmp_path / "x.safetensors", state | {"thumbnail": torch.zeros(3)})
    assert any("'thumbnail'" in note for note in load_ldm(checkpoints, tmp_path / "x.safetensors").notes)


def test_the_fingerprint_is_bound_to_weights_and_configs(checkpoints: ModuleType, tmp_path: Path) -> None:
    states = checkpoints.write_folder(tmp_path / "a")
    checkpoints.write_folder(tmp_path / "b")
    first = load_checkpoint(tmp_path / "a").fingerprint
    assert first == load_checkpoint(tmp_path / "b").fingerprint  # where the files lie does not matter
    assert first == load_checkpoint(tmp_path / "a").fingerprint and len(first) == 64
    prints = {first, load_checkpoint(tmp_path / "a", prediction_type="v").fingerprint}
    for part in ("unet", "vae", "text"):
        name = sorted(states[part])[-1]
        changed = {key: dict(state) for key, state in states.items()}
        changed[part][name] = changed[part][name] + 1e-3
        checkpoints.write_folder(tmp_path / "b", states=changed)
        prints.add(load_checkpoint(tmp_path / "b").fingerprint)
    checkpoints.write_folder(tmp_path / "b", vae=replace(checkpoints.REDUCED_VAE, scaling_factor=0.2))
    prints.add(load_checkpoint(tmp_path / "b").fingerprint)
    assert len(prints) == 6


def test_nothing_of_a_checkpoint_is_imported(folder: Path) -> None:
    """A config may name code (auto_map); no loader of ours follows it, and diffusers is not needed."""
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"auto_map": None, "_name_or_path": "evil/model"}))
    (folder / "pipeline.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys; from ledits_min.weights.load import load_checkpoint; load_checkpoint(sys.argv[1]); "
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules and 'pipeline' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)

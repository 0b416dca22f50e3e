"""Every dialect of one random model loads as the same tensors, without a copy; everything else is refused by name."""

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
from torch import Tensor

from ledits_min.config import SD15_SCHEDULE, SD15_TEXT, SD15_UNET, SD15_VAE, InputError
from ledits_min.text import build_text_model
from ledits_min.unet import UNet
from ledits_min.vae import VAE
from ledits_min.weights.header import read_header
from ledits_min.weights.load import Checkpoint, fetch, load_checkpoint
from ledits_min.weights.survey import check_complete, survey_file

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


@pytest.fixture(scope="module")
def pristine(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    checkpoints.write_folder(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A diffusers folder of one's own, to damage."""
    return shutil.copytree(pristine, tmp_path / "model")


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


def test_mixed_dtypes_are_kept_with_a_note(checkpoints: ModuleType, folder: Path) -> None:
    state = checkpoints.random_states()["unet"]
    state["conv_in.weight"] = state["conv_in.weight"].half()
    checkpoints.save_file(state, folder / UNET_FILE)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.unet["conv_in.weight"].dtype == torch.float16
    assert any("mixed dtypes" in note for note in checkpoint.notes)


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
        "is I8; non-float weights are not supported",
    ),
    "float8": (
        edit_state("unet", UNET_FILE, lambda s: s.update({n: t.to(torch.float8_e4m3fn) for n, t in s.items()})),
        "is F8_E4M3; 8-bit or smaller float weights are not supported",
    ),
    "nan": (
        edit_state("vae", VAE_FILE, lambda s: s.update({"quant_conv.bias": torch.full((8,), torch.nan)})),
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
    "SD 2 unet": (edit_state("unet", UNET_FILE, with_context(1024)), "SD 2.x file: not supported yet"),
    "SDXL unet": (edit_state("unet", UNET_FILE, with_context(2048)), "SDXL file: not supported yet"),
    "vae in unet/": (lambda c, f: c.save(f / UNET_FILE, c.random_states()["vae"]), "holds no unet .found: vae"),
    "lora in unet/": (
        lambda c, f: c.save(f / UNET_FILE, {"unet.mid_block.to_q.lora_A.weight": torch.zeros(2, 2)}),
        "LoRA",
    ),
    "no unet file": (remove(UNET_FILE), "holds no diffusion_pytorch_model.safetensors"),
    "only a pickle": (rename(VAE_FILE, "vae/diffusion_pytorch_model.bin"), "a pickle, which can run code"),
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
    "SDXL folder": (lambda c, f: (f / "text_encoder_2").mkdir(), "SDXL"),
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
    (folder / "config.json").write_text(json.dumps(replace(SD15_VAE, scaling_factor=0.13025).to_json()))
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


def test_prediction_type(checkpoints: ModuleType, folder: Path, tmp_path: Path) -> None:
    assert load_checkpoint(folder).schedule_config.prediction_type == "epsilon"
    for spelling in ("v", "v_prediction"):
        assert load_checkpoint(folder, prediction_type=spelling).schedule_config.prediction_type == "v_prediction"
    with pytest.raises(InputError, match="choices are eps and v"):
        load_checkpoint(folder, prediction_type="sample")
    checkpoints.write_folder(folder, schedule=replace(SD15_SCHEDULE, prediction_type="v_prediction"))
    assert load_checkpoint(folder).schedule_config.prediction_type == "v_prediction"
    assert load_checkpoint(folder, prediction_type="eps").schedule_config.prediction_type == "epsilon"

    path = tmp_path / "x.safetensors"
    checkpoints.write_ldm(path, metadata={"modelspec.prediction_type": "v"})
    assert load_ldm(checkpoints, path).schedule_config.prediction_type == "v_prediction"
    state = checkpoints.ldm_state(checkpoints.random_states(), checkpoints.REDUCED_UNET, checkpoints.REDUCED_VAE)
    checkpoints.save(path, state | {"v_pred": torch.zeros(0)})
    assert load_ldm(checkpoints, path).schedule_config.prediction_type == "v_prediction"
    checkpoints.save(path, state | {"ztsnr": torch.zeros(0)})
    with pytest.raises(InputError, match="zero terminal SNR"):
        load_ldm(checkpoints, path)


def test_no_scheduler_config_means_stable_diffusion_1(folder: Path) -> None:
    (folder / "scheduler/scheduler_config.json").unlink()
    checkpoint = load_checkpoint(folder)
    assert checkpoint.schedule_config == SD15_SCHEDULE
    assert any("no scheduler config" in note for note in checkpoint.notes)


def test_defaults_are_passed_on(folder: Path) -> None:
    (folder / "ledits.json").write_text('{"num_steps": 40}')
    assert load_checkpoint(folder).defaults == {"num_steps": 40}


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

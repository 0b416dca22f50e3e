"""Where a refusal rests on a name, insistence overrules it; where tensors prove it, nothing does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ledits_min import LEdits
from ledits_min.app.cli import main
from ledits_min.config import SD15_SCHEDULE
from ledits_min.errors import InputError
from ledits_min.files.configs import config_json
from ledits_min.weights.inspect import inspect
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.read.published import SD15, SDXL
from ledits_min.weights.read.survey import survey_whole

SCHEDULER = "scheduler/scheduler_config.json"
# A tensor that some tool left in a whole checkpoint -> what the file is then taken for.
LEFT_OVER = {
    "lora_unet_mid_block_attentions_0_proj_in.alpha": "a LoRA file",
    "control_model.input_hint_block.0.weight": "a ControlNet file",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter file",
    "emb_params": "a textual inversion file",
    "motion_modules.0.temporal_transformer.norm.weight": "a video model file",
    "double_blocks.0.img_attn.qkv.weight": "a Flux file",
}


@pytest.fixture
def whole(checkpoints: ModuleType, tmp_path: Path) -> Any:
    """whole(family, name=(dtype, shape), ...): a single file of full size without weights, with more tensors."""

    def write(family: Any, **more: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        checkpoints.write_hollow(path, checkpoints.family_listing(family.name, family.configs) | more)
        return path

    return write


@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda family: family.name)
def test_a_left_over_name_is_no_proof(whole: Any, family: Any) -> None:
    plain = survey_whole(whole(family))
    for name, kind in LEFT_OVER.items():
        path = whole(family, **{name: ("F16", (2, 2))})
        with pytest.raises(InputError, match=rf"is {kind}: .*only left in a plain checkpoint, pass --insist") as caught:
            survey_whole(path)
        assert str(caught.value).isprintable() and f"'{name}'" in str(caught.value)
        insisted = survey_whole(path, insist=True)
        assert insisted.configs == plain.configs
        assert {part: set(names) for part, names in insisted.parts.items()} == {
            part: set(names) for part, names in plain.parts.items()
        }
        assert f"ignored: 1 tensor of no part known here ('{name}')" in insisted.notes
        assert (inspect(path).verdict, inspect(path, insist=True).verdict) == ("refused", "loads")


PROVEN: dict[str, tuple[dict[str, Any], str]] = {
    "noise levels of EDM": ({"edm_vpred.sigma_max": ("F32", (1,))}, "EDM noise levels"),
    "beside a left-over name": ({"edm_mean": ("F32", (4,)), "emb_params": ("F32", (1, 768))}, "EDM noise levels"),
    "a name inside the UNet": (
        {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight": ("F16", (2, 320))},
        "is a LoRA file",
    ),
    "channels of inpainting": (
        {"model.diffusion_model.input_blocks.0.0.weight": ("F16", (320, 9, 3, 3))}, "inpainting"
    ),
    "scaled weights": ({"model.diffusion_model.out.2.scale_weight": ("F32", (1,))}, "scaled fp8"),
    "a unet of another shape": ({"model.diffusion_model.out.2.weight": ("F16", (8, 320, 3, 3))}, "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVEN)
def test_what_tensors_prove_stays_refused(whole: Any, name: str) -> None:
    more, why = PROVEN[name]
    path = whole(SD15, **more)
    for insist in (False, True):
        with pytest.raises(InputError, match=why) as caught:
            survey_whole(path, insist=insist)
        assert "--insist" not in str(caught.value)


def test_a_lora_is_no_checkpoint_however_it_is_insisted(tmp_path: Path) -> None:
    """Without a UNet in the file its names are all there is."""
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 32)}
    save_file(lora, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is a LoRA file: it only changes another checkpoint") as caught:
        survey_whole(tmp_path / "x.safetensors", insist=True)
    assert "--insist" not in str(caught.value)


@pytest.mark.parametrize(
    "sampler",
    [
        {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0},
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    ],
    ids=["LCM", "turbo"],
)
def test_a_plain_model_may_be_saved_with_a_sampler_of_few_steps(
    checkpoints: ModuleType, tmp_path: Path, sampler: dict[str, Any]
) -> None:
    """Its betas are read; what diffusers writes for each class is tried in tests/oracle/test_schedule.py."""
    checkpoints.write_folder(tmp_path)
    written = config_json(SD15_SCHEDULE) | sampler
    (tmp_path / SCHEDULER).write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"distilled to a few steps.*saved with this sampler, pass --insist"):
        load_checkpoint(tmp_path)
    checkpoint = load_checkpoint(tmp_path, insist=True)
    assert checkpoint.schedule_config == SD15_SCHEDULE
    assert sum("since it is insisted on" in note for note in checkpoint.notes) == 1
    (tmp_path / SCHEDULER).write_text(json.dumps(written | {"beta_schedule": "cosine"}))
    with pytest.raises(InputError, match="beta_schedule"):
        load_checkpoint(tmp_path, insist=True)


@pytest.mark.parametrize("name", ["transformer", "prior", "image_normalizer"])
def test_a_left_over_folder_is_no_proof(checkpoints: ModuleType, tmp_path: Path, name: str) -> None:
    checkpoints.write_folder(tmp_path / "m")
    (tmp_path / "m" / name).mkdir()
    with pytest.raises(InputError, match=f"{name}/ was only left in a plain checkpoint, pass --insist"):
        load_checkpoint(tmp_path / "m")
    assert load_checkpoint(tmp_path / "m", insist=True).unet
    (tmp_path / "m/unet").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"it has {name}/; not supported") as caught:
        load_checkpoint(tmp_path / "m", insist=True)
    assert "--insist" not in str(caught.value)


def test_the_command_and_the_library_take_it(
    checkpoints: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.write_folder(tmp_path)
    (tmp_path / "transformer").mkdir()
    assert main(["inspect", str(tmp_path)]) == 2
    assert main(["inspect", str(tmp_path), "--insist"]) == 0
    assert "verdict   loads" in capsys.readouterr().out
    assert LEdits.from_pretrained(tmp_path, device="cpu", dtype="float32", insist=True).native_size
    with pytest.raises(InputError, match="--insist"):
        LEdits.from_pretrained(tmp_path, device="cpu", dtype="float32")


@pytest.mark.parametrize(("word", "ordinary"), [("cat", True), ("Style", True), ("my cat", False), ("stylx", False)])
def test_an_ordinary_word_for_an_embedding_is_warned_of(
    checkpoints: ModuleType, tmp_path: Path, word: str, ordinary: bool
) -> None:
    checkpoints.write_folder(tmp_path / "m")
    save_file({"emb_params": torch.randn(2, 24)}, tmp_path / f"{word}.safetensors")
    line = (
        f"the embedding's word '{word}' is also an ordinary word; every '{word}' in a prompt is now the embedding; "
        "name it with FILE:WORD"
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        LEdits.from_pretrained(
            tmp_path / "m", device="cpu", dtype="float32", embedding=tmp_path / f"{word}.safetensors"
        )  # fmt: skip
    assert [str(one.message) for one in heard if "ordinary word" in str(one.message)] == [line] * ordinary

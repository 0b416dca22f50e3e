"""Memory while loading each family in each dialect at full size: the peak of a fresh process over what it held before.

The files hold random weights in float16. Loading counts as done when every page of every weight has been read once.
Resident memory counts mapped pages of the file, so nothing can hide there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ledits_min.config import UNetConfig, VAEConfig
from ledits_min.files.configs import config_json
from ledits_min.weights.names.ldm import (
    OPENCLIP_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    XL_TEXT_2_PREFIX,
    XL_TEXT_PREFIX,
    unet_table,
    vae_table,
)
from ledits_min.weights.read.folder import FOLDERS, STEMS
from ledits_min.weights.read.published import SD15, SD20, SDXL, Family
from ledits_min.weights.read.shapes import expected_shapes

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read as Linux tells it"
)

MOST = 1.15  # times the larger of the bytes used in the file and the bytes at the compute dtype
TEXT_PREFIXES = {
    "SD 1.x": {"text": TEXT_PREFIX},
    "SD 2.x": {"text": OPENCLIP_PREFIX},
    "SDXL": {"text": XL_TEXT_PREFIX, "text_2": XL_TEXT_2_PREFIX},
}

MEASURE = """
import json, sys
import torch
from ledits_min.pipeline import LEdits
def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = resident("VmRSS")
ledits = LEdits.from_pretrained(sys.argv[1], device="cpu", dtype=sys.argv[2], prediction_type="eps")
texts = [ledits.text.first.model, ledits.text.second.model] if hasattr(ledits.text, "first") else [ledits.text.model]
weights = 0
for module in [ledits.unet, ledits.vae, *texts]:
    for tensor in module.state_dict().values():
        tensor.flatten()[:: 4096 // tensor.element_size()].float().sum()
        weights += tensor.nbytes
print(json.dumps({"peak": resident("VmHWM") - before, "weights": weights}))
"""


def random_states(family: Family) -> dict[str, dict[str, Tensor]]:
    return {
        part: {name: torch.rand(shape).mul_(0.02).half() for name, shape in expected_shapes(config).items()}
        for part, config in family.configs.items()
    }


def write_folder(path: Path, family: Family) -> None:
    for part, state in random_states(family).items():
        (path / FOLDERS[part]).mkdir(parents=True)
        (path / FOLDERS[part] / "config.json").write_text(json.dumps(config_json(family.configs[part])))
        save_file(state, path / FOLDERS[part] / f"{STEMS[part]}.safetensors")


def write_ldm(path: Path, family: Family) -> None:
    states, unet, vae = random_states(family), family.configs["unet"], family.configs["vae"]
    assert isinstance(unet, UNetConfig) and isinstance(vae, VAEConfig)
    result = {UNET_PREFIX + theirs: states["unet"][ours] for theirs, ours in unet_table(unet).items()}
    for theirs, ours in vae_table(vae).items():
        tensor = states["vae"][ours]
        result[VAE_PREFIX + theirs] = tensor[:, :, None, None] if ".attn_1." in theirs and tensor.dim() == 2 else tensor
    for part, prefix in TEXT_PREFIXES[family.name].items():
        openclip = prefix in (OPENCLIP_PREFIX, XL_TEXT_2_PREFIX)
        result |= {f"{prefix}{name}": t for name, t in (as_openclip if openclip else as_clip)(states[part]).items()}
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, path)


def as_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"text_model.{name}": tensor for name, tensor in state.items()}


def as_openclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            joint = torch.cat(
                [state[name.replace("q_proj", projection)] for projection in ("q_proj", "k_proj", "v_proj")]
            )
            name, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), joint
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding").replace("embeddings.", "")
        name = name.replace("text_projection.weight", "text_projection").replace("final_layer_norm", "ln_final")
        name = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
        name = name.replace("layer_norm", "ln_").replace("fc1", "c_fc").replace("fc2", "c_proj")
        result[name] = tensor.T if name == "text_projection" else tensor
    return result


@pytest.fixture(scope="module", params=[SD15, SD20, SDXL], ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture(scope="module", params=["folder", "single file"])
def model(family: Family, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("checkpoint")
    if request.param == "folder":
        write_folder(place, family)
        yield place
    else:
        write_ldm(place / "model.safetensors", family)
        yield place / "model.safetensors"
    for path in place.rglob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_peak_while_loading(benchmark: Any, model: Path, dtype: str) -> None:
    measured: list[dict[str, int]] = []

    def load() -> None:
        command = [sys.executable, "-c", MEASURE, str(model), dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(load, rounds=1)
    peak, weights = measured[0]["peak"], measured[0]["weights"]
    benchmark.extra_info |= {"peak_GB": round(peak / 1e9, 2), "weights_GB": round(weights / 1e9, 2)}
    print(f"\n{model.name}, {dtype}: peak {peak / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB, {peak / weights:.3f}")
    assert peak <= MOST * weights

"""What stands between a checkpoint and its networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ledits_min import InputError
from ledits_min.config import TextConfig
from ledits_min.engine import networks
from ledits_min.engine.networks import build_networks, fits_channels_last, resolve_dtype
from ledits_min.files.configs import read_config
from ledits_min.text import TextEncoder, build_text_model
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.tokenizer import load_tokenizer

TINY = Path(__file__).parents[2] / "weights/tiny"


@pytest.mark.parametrize(("dtype", "wanted", "advice"), [
    (torch.float32, 4, "--dtype bfloat16 halves it"), (torch.bfloat16, 2, "a smaller model is needed"),
])  # fmt: skip
def test_weights_that_cannot_fit_are_refused_before_they_are_read(
    dtype: torch.dtype, wanted: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, device = load_checkpoint("tiny"), torch.device("cpu")
    numbers = sum(t.numel() for state in (checkpoint.unet, checkpoint.vae, checkpoint.text) for t in state.values())
    monkeypatch.setattr(networks, "total_memory", lambda device: wanted * numbers - 1)
    with pytest.raises(InputError, match=advice):
        build_networks(checkpoint, device, dtype)
    assert checkpoint.unet, "it was given to a network"
    monkeypatch.setattr(networks, "total_memory", lambda device: wanted * numbers)
    assert next(build_networks(checkpoint, device, dtype).unet.parameters()).dtype == dtype


@pytest.mark.parametrize(("capabilities", "wanted"), [
    ({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_tile": True}, torch.bfloat16),
])  # fmt: skip
def test_a_cpu_is_never_given_float16_unasked(
    capabilities: dict[str, bool], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_dtype("auto", torch.device("cpu")) == wanted
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("length", [10**30, None, 5])
def test_a_prompt_has_the_text_encoders_length_whatever_the_tokenizer_says(tmp_path: Path, length: int | None) -> None:
    shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    config = read_config(TextConfig, json.loads((TINY / "text_encoder/config.json").read_text()), "config.json")
    encoder = TextEncoder(load_tokenizer(tmp_path / "tokenizer", config), build_text_model(config))
    assert encoder.tokenizer.model_max_length == config.max_position_embeddings
    assert encoder.encode(["a portrait"]).tokens.shape[1] == config.max_position_embeddings


def test_unknown_words_are_named_where_a_tokenizer_does_not_split(tmp_path: Path) -> None:
    shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": None}))
    config = read_config(TextConfig, json.loads((TINY / "text_encoder/config.json").read_text()), "config.json")
    encoder = TextEncoder(load_tokenizer(tmp_path / "tokenizer", config), build_text_model(config))
    with pytest.raises(InputError, match="does not know 'a zebra'"):
        encoder.check("a zebra")


@pytest.mark.parametrize(
    ("device", "stored", "width", "wanted"),
    [
        ("cuda", torch.float16, 32, True),
        ("cpu", torch.float16, 128, True),
        ("cpu", torch.float16, 127, False),
        ("cpu", torch.float32, 128, False),  # another layout would be a copy of what lies in the file
    ],
)
def test_where_channels_lie_together(device: str, stored: torch.dtype, width: int, wanted: bool) -> None:
    network: Any = SimpleNamespace(
        config=SimpleNamespace(block_out_channels=(width, 2 * width)),
        parameters=lambda: iter([torch.zeros(1, dtype=stored)]),
    )
    assert fits_channels_last(network, torch.device(device), torch.float32) == wanted

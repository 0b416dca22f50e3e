"""What stands between a checkpoint and its networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ledits_min import InputError, networks
from ledits_min.config import TextConfig
from ledits_min.networks import build_networks
from ledits_min.text import TextEncoder, build_text_model, load_tokenizer
from ledits_min.weights.load import load_checkpoint

TINY = Path(__file__).parents[1] / "weights/tiny"


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


def test_unknown_words_are_named_where_a_tokenizer_does_not_split(tmp_path: Path) -> None:
    shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": None}))
    config = TextConfig.from_json(json.loads((TINY / "text_encoder/config.json").read_text()), "config.json")
    encoder = TextEncoder(load_tokenizer(tmp_path / "tokenizer", config), build_text_model(config))
    with pytest.raises(InputError, match="does not know 'a zebra'"):
        encoder.check("a zebra")

"""A single file's plain and averaged weights: which is read, and that the choice is said."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ledits_min.config import SD15_TEXT, SD15_UNET, SD15_VAE
from ledits_min.errors import InputError
from ledits_min.files.header import read_header
from ledits_min.weights.inspect import inspect
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.read.ema import choose_weights
from ledits_min.weights.read.identify import Stored, stored

PLAIN, EMA = "model.diffusion_model.", "model_ema.diffusion_model"


def averaged(name: str) -> str:
    """The name torch's buffers force on an average: without dots."""
    return EMA + name.removeprefix(PLAIN).replace(".", "")


@pytest.fixture
def both(checkpoints: ModuleType, tmp_path: Path) -> Path:
    """A reduced file whose average is the plain weights plus one."""
    path = tmp_path / "both.safetensors"
    checkpoints.write_ldm(path, buffers=True)
    state = load_file(path)
    state |= {averaged(name): tensor + 1.0 for name, tensor in state.items() if name.startswith(PLAIN)}
    save_file(state, path)
    return path


def choose(path: Path, ema: bool, checkpoints: ModuleType) -> tuple[dict[str, Stored], list[str]]:
    return choose_weights(stored(path, read_header(path)), ema, [SD15_UNET, checkpoints.REDUCED_UNET], "'x'")


def unet(path: Path, chosen: dict[str, Stored]) -> dict[str, Tensor]:
    state = load_file(path)
    return {name: state[tensor.name] for name, tensor in chosen.items() if name.startswith(PLAIN)}


def test_the_plain_weights_are_the_default(checkpoints: ModuleType, both: Path) -> None:
    chosen, notes = choose(both, False, checkpoints)
    assert all(name == tensor.name for name, tensor in chosen.items()) and notes == []


def test_the_average_on_request(checkpoints: ModuleType, both: Path) -> None:
    chosen, notes = choose(both, True, checkpoints)
    state = load_file(both)
    found = unet(both, chosen)
    assert set(found) == {name for name in state if name.startswith(PLAIN)}
    assert all(torch.equal(tensor, state[name] + 1.0) for name, tensor in found.items())
    assert not any(name.startswith(EMA) for name in chosen)
    assert notes == ["the EMA weights of the UNet are used"]


@pytest.mark.parametrize("ema", [False, True])
def test_a_file_with_nothing_but_the_average(checkpoints: ModuleType, both: Path, ema: bool) -> None:
    """There is no choice, and no plain names to spell the averaged ones from: the known UNets spell them."""
    whole = load_file(both)
    save_file({name: tensor for name, tensor in whole.items() if not name.startswith(PLAIN)}, both)
    chosen, notes = choose(both, ema, checkpoints)
    found = unet(both, chosen)
    assert set(found) == {name for name in whole if name.startswith(PLAIN)}
    assert all(torch.equal(tensor, whole[name] + 1.0) for name, tensor in found.items())
    assert notes == ["the EMA weights of the UNet are used: the file holds no others"]


def test_an_average_that_is_not_there_or_not_whole(checkpoints: ModuleType, both: Path) -> None:
    state = load_file(both)
    lacking = next(name for name in state if name.startswith(EMA))
    save_file({name: tensor for name, tensor in state.items() if name != lacking}, both)
    with pytest.raises(InputError, match="lack 1 of .* tensors of the UNet"):
        choose(both, True, checkpoints)
    choose(both, False, checkpoints)
    save_file({name: tensor for name, tensor in state.items() if not name.startswith(EMA)}, both)
    with pytest.raises(InputError, match="holds no EMA weights; leave out --ema"):
        choose(both, True, checkpoints)


def test_full_size_through_the_public_door(checkpoints: ModuleType, tmp_path: Path) -> None:
    """The names of Stable Diffusion 1.5; two weights that are not zero tell the sets apart."""
    path = tmp_path / "x.safetensors"
    listing = checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT, "F16")
    listing |= {averaged(name): entry for name, entry in listing.items() if name.startswith(PLAIN)}
    checkpoints.write_hollow(path, listing)
    header = read_header(path)
    for name, value in ((f"{PLAIN}out.2.bias", 1.0), (averaged(f"{PLAIN}out.2.bias"), 2.0)):
        with open(path, "r+b") as file:
            file.seek(header.data_start + header.tensors[name].begin)
            file.write(torch.full((4,), value, dtype=torch.float16).numpy().tobytes())
    plain, average = load_checkpoint(path), load_checkpoint(path, ema=True)
    assert plain.unet["conv_out.bias"].tolist() == [1.0] * 4 and average.unet["conv_out.bias"].tolist() == [2.0] * 4
    assert plain.fingerprint != average.fingerprint
    assert any("686 tensors, EMA copy of the UNet" in note for note in plain.notes)
    assert any("EMA weights of the UNet are used" in note for note in average.notes)
    assert inspect(path, ema=True).verdict == "loads"


def test_a_folder_has_one_set(pristine: Path) -> None:
    with pytest.raises(InputError, match="those hold one set of weights; --ema is for single files"):
        load_checkpoint(pristine, ema=True)
    assert inspect(pristine, ema=True).verdict == "refused"

"""The same inputs, seed, device and version give the same bytes; other shapes and dtypes differ within a bound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ledits_min import Concept, Inversion, LEdits, Result
from ledits_min.app.cli import main

SAMPLES = sorted((Path(__file__).parents[1] / "weights/tiny/samples").glob("*.png"))
QUICK: dict[str, Any] = {"num_steps": 10, "skip": 3, "progress": False}
SMALL = {**QUICK, "num_steps": 4, "skip": 1, "size": 64}  # where a CPU is slow in half precision
CONCEPTS = [Concept("sunglasses"), Concept("smile", reverse=True)]
# Largest difference of latents and of 8-bit levels against float32, and of a picture in a batch against itself alone.
# A mask is a comparison: where two values are almost equal, a last bit moves an element in or out of an edit.
AGAINST_FLOAT32 = {"bfloat16": (0.5, 40), "float16": (0.3, 20)}
AGAINST_ALONE = {"float32": (1e-3, 2), "bfloat16": (0.5, 40)}  # float16 is slow on a CPU and differs as bfloat16 does


@cache
def model(dtype: str) -> LEdits:
    return LEdits.from_pretrained("tiny", device="cpu", dtype=dtype)


@cache
def edited(dtype: str, pictures: tuple[int, ...], small: bool = False) -> tuple[Inversion, Result]:
    """Pictures by number, each with the seed 5 + its number."""
    ledits, settings = model(dtype), SMALL if small else QUICK
    inversion = ledits.invert([SAMPLES[i] for i in pictures], seed=[5 + i for i in pictures], **settings)
    return inversion, ledits.edit(inversion, concepts=CONCEPTS, trace=True, progress=False)


def levels(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def test_everything_the_command_writes_is_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(SAMPLES[0], tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        written = ["-o", f"{name}.png", "--masks", f"{name}.masks.png", "--report", f"{name}.json"]
        written += ["--save-inversion", f"{name}.safetensors"]
        assert main(["edit", "p.png", "--add", "hat", "--steps", "10", "--skip", "3", "--seed", "7", *written]) == 0
    for suffix in ("png", "masks.png", "safetensors"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes(), suffix
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first.pop("seconds").keys() == second.pop("seconds").keys()
    assert first == second


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_repeats_to_the_last_bit(dtype: str) -> None:
    small = dtype != "float32"
    inversion, result = edited(dtype, (0,), small)
    again = model(dtype).invert(SAMPLES[0], seed=5, **(SMALL if small else QUICK))
    for name in ("x_T", "residuals", "latents"):
        assert torch.equal(getattr(inversion, name), getattr(again, name)), name
    repeated = model(dtype).edit(again, concepts=CONCEPTS, trace=True, progress=False)
    assert torch.equal(result.latents, repeated.latents)
    assert all(torch.equal(*masks) for masks in zip(result.masks, repeated.masks, strict=True))
    assert result.images[0].tobytes() == repeated.images[0].tobytes()
    assert result.trace == repeated.trace


@pytest.mark.parametrize(
    ("dtype", "pictures", "small"), [("bfloat16", (0,), True), ("float16", (0,), True), ("float32", (0, 1, 2), False)]
)
def test_the_noise_of_a_seed_is_the_same_for_every_dtype_and_batch(
    dtype: str, pictures: tuple[int, ...], small: bool
) -> None:
    """x_T - sqrt(alpha_bar) x_0 is the noise, whatever network encoded the picture."""

    def noise(dtype: str, pictures: tuple[int, ...], i: int) -> torch.Tensor:
        inversion, result = edited(dtype, pictures, small)
        alpha_bar = float(result.trace[0]["alpha_bar"])
        return (inversion.x_T[i] - alpha_bar**0.5 * inversion.latents[i]) / (1.0 - alpha_bar) ** 0.5

    wanted = noise("float32", (0,), 0)
    assert 0.9 < float(wanted.std()) < 1.1
    torch.testing.assert_close(noise(dtype, pictures, 0), wanted, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("dtype", AGAINST_FLOAT32)
def test_dtypes_mean_the_same_edit(dtype: str) -> None:
    (_, exact), (_, result) = (edited(name, (0,), small=True) for name in ("float32", dtype))
    latents = float((exact.latents - result.latents).abs().max())
    print(f"{dtype} against float32: latents {latents:.2e}, levels {levels(exact.images[0], result.images[0])}")
    assert latents <= AGAINST_FLOAT32[dtype][0]
    assert levels(exact.images[0], result.images[0]) <= AGAINST_FLOAT32[dtype][1]


@pytest.mark.parametrize("dtype", AGAINST_ALONE)
def test_a_picture_in_a_batch_of_three_is_itself(dtype: str) -> None:
    small = dtype != "float32"
    _, together = edited(dtype, (0, 1, 2), small)
    for i in range(3):
        _, alone = edited(dtype, (i,), small)
        latents = float((together.latents[i] - alone.latents[0]).abs().max())
        difference = levels(together.images[i], alone.images[0])
        print(f"{dtype}, picture {i} in a batch: latents {latents:.2e}, levels {difference}")
        assert latents <= AGAINST_ALONE[dtype][0]
        assert difference <= AGAINST_ALONE[dtype][1]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_thread_or_two(threads: None) -> None:
    """Sums are split differently, so the last bits may differ: a bound, not equality."""
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        inversion = model("float32").invert(SAMPLES[1], seed=6, **QUICK)
        results.append(model("float32").edit(inversion, concepts=CONCEPTS, progress=False))
    latents = float((results[0].latents - results[1].latents).abs().max())
    print(f"one thread against two: latents {latents:.2e}, levels {levels(results[0].images[0], results[1].images[0])}")
    assert latents <= AGAINST_ALONE["float32"][0]
    assert levels(results[0].images[0], results[1].images[0]) <= AGAINST_ALONE["float32"][1]

"""`LEdits` on the embedded model: what the public interface promises, end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ledits_min import Concept, InputError, Inversion, LEdits
from ledits_min.errors import RunError
from ledits_min.files.configs import config_json
from ledits_min.files.inversion import FORMAT
from ledits_min.files.square import find_square
from ledits_min.inversion import draw_noise

SAMPLES = sorted((Path(__file__).parents[1] / "weights/tiny/samples").glob("*.png"))
QUICK = {"num_steps": 10, "skip": 3, "progress": False}


@pytest.fixture(scope="module")
def inversion(ledits: LEdits) -> Inversion:
    return ledits.invert(SAMPLES[0], **QUICK)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("num_steps", "skip"), [(1, 0), (13, 0), (50, 18), (100, 36)])
def test_reconstruction_is_exact_in_float32(ledits: LEdits, eta: float, num_steps: int, skip: int) -> None:
    """Both prompts empty, no concepts."""
    inverted = ledits.invert(SAMPLES[1], num_steps=num_steps, skip=skip, eta=eta, progress=False)
    result = ledits.edit(inverted, progress=False)
    assert (result.latents - inverted.latents).abs().max() <= 1e-4
    assert difference(result.images[0], Image.open(SAMPLES[1])) <= 1


def test_reconstruction_with_a_source_prompt(ledits: LEdits) -> None:
    """The guided eps of the edit is that of the inversion when target = source at the source's scale."""
    inverted = ledits.invert(SAMPLES[0], source="a portrait with a beard", source_guidance_scale=3.5, **QUICK)
    same = ledits.edit(inverted, target="a portrait with a beard", guidance_scale=3.5, progress=False)
    assert (same.latents - inverted.latents).abs().max() <= 1e-4
    other = ledits.edit(inverted, progress=False)
    assert (other.latents - inverted.latents).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_reconstruction_stays_close(dtype: str) -> None:
    """Calls of one size while inverting and of another while editing round differently. Printed, not hidden."""
    half = LEdits.from_pretrained("tiny", device="cpu", dtype=dtype)
    inverted = half.invert(SAMPLES[0], size=64, **QUICK)  # small, because CPUs are slow in half precision
    error = (half.edit(inverted, progress=False).latents - inverted.latents).abs().max()
    print(f"largest latent error of a reconstruction in {dtype}: {error:.1e}")
    assert inverted.residuals.dtype == torch.float32
    assert error < 0.05


def test_a_concept_changes_the_picture_and_reports_where(ledits: LEdits, inversion: Inversion) -> None:
    concepts = [Concept("sunglasses"), Concept(""), Concept("beard", guidance_scale=0.0), Concept("hat", reverse=True)]
    result = ledits.edit(inversion, concepts=concepts, trace=True, progress=False)
    assert difference(result.images[0], Image.open(SAMPLES[0])) > 20
    assert [tuple(mask.shape) for mask in result.masks] == [(1, 16, 16)] * 4
    acted = [bool(mask.any()) for mask in result.masks]
    assert acted == [True, False, False, True]
    assert all(float(mask.min()) >= 0.0 and float(mask.max()) <= 1.0 for mask in result.masks)
    # Ten percent of each channel, as the embedded model's threshold of 0.9 asks.
    assert float(result.masks[0].mean()) == pytest.approx(0.1, abs=0.01)

    assert len(result.trace) == 7
    first, second = result.trace[:2]
    assert set(first) == {"t", "alpha_bar", "sigma", "eps_rms", "mask_fraction", "gamma_rms", "x_rms"}
    assert set(first["eps_rms"]) == {"uncond"}  # both concepts warm up for one step
    assert set(second["eps_rms"]) == {"uncond", "sunglasses", "hat"}
    assert json.loads(json.dumps(result.trace, allow_nan=False)) == result.trace


def test_what_comes_back_is_printed_without_its_tensors(ledits: LEdits, inversion: Inversion) -> None:
    result = ledits.edit(inversion, concepts=[Concept("sunglasses")], trace=True, progress=False)
    assert "tensor" not in repr(result) and "image" in repr(result)
    assert "tensor" not in repr(inversion) and "num_steps" in repr(inversion)


def test_a_concept_that_never_acts_is_said_to(ledits: LEdits, inversion: Inversion) -> None:
    with pytest.warns(UserWarning, match="'beard' never acts: only 7 steps"):
        ledits.edit(inversion, concepts=[Concept("beard", warmup_steps=7)], progress=False)


def test_same_seed_same_bytes_other_seed_other_edit(ledits: LEdits) -> None:
    """The seed changes the edit and never the reconstruction."""
    edits = []
    for seed in (0, 0, 1):
        inverted = ledits.invert(SAMPLES[0], seed=seed, **QUICK)
        edits.append(ledits.edit(inverted, concepts=[Concept("beard")], progress=False))
        plain = ledits.edit(inverted, progress=False)
        assert difference(plain.images[0], Image.open(SAMPLES[0])) <= 1
    assert edits[0].images[0].tobytes() == edits[1].images[0].tobytes()
    assert edits[0].images[0].tobytes() != edits[2].images[0].tobytes()


def test_a_batch_gives_what_its_pictures_give_alone(ledits: LEdits) -> None:
    concepts = [Concept("sunglasses"), Concept("smile")]
    together = ledits.edit(ledits.invert(SAMPLES[:3], seed=[5, 6, 7], **QUICK), concepts=concepts, progress=False)
    for i, path in enumerate(SAMPLES[:3]):
        alone = ledits.edit(ledits.invert(path, seed=5 + i, **QUICK), concepts=concepts, progress=False)
        assert (together.latents[i] - alone.latents[0]).abs().max() < 1e-3
        assert difference(together.images[i], alone.images[0]) <= 2


def test_given_noise_replaces_the_seed(ledits: LEdits, inversion: Inversion) -> None:
    noise = draw_noise([0], 7, (4, 16, 16))
    given = ledits.invert(SAMPLES[0], noise=noise, **QUICK)
    assert torch.equal(given.residuals, inversion.residuals)
    assert given.settings.seeds == ()
    with pytest.raises(InputError, match="noise"):
        ledits.invert(SAMPLES[0], noise=noise[1:], **QUICK)
    with pytest.raises(InputError, match="finite"):
        ledits.invert(SAMPLES[0], noise=torch.full_like(noise, torch.inf), **QUICK)


def test_images_may_be_paths_pictures_or_arrays(ledits: LEdits, inversion: Inversion) -> None:
    picture = Image.open(SAMPLES[0])
    for image in (str(SAMPLES[0]), picture, np.asarray(picture.convert("RGB"))):
        assert torch.equal(ledits.invert(image, **QUICK).x_T, inversion.x_T)
    with pytest.raises(InputError):
        ledits.invert(np.zeros((64, 64, 3), dtype=np.float32), **QUICK)
    with pytest.raises(InputError, match="no image"):
        ledits.invert([], **QUICK)


def test_pictures_of_different_sizes_are_refused_unless_a_size_is_given(
    ledits: LEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledits, "defaults", replace(ledits.defaults, one_size=False))
    side = ledits.native_size
    wide = Image.open(SAMPLES[0]).resize((3 * side // 2, side))
    with pytest.raises(InputError, match="different sizes"):
        ledits.invert([SAMPLES[0], wide], **QUICK)
    assert ledits.invert([SAMPLES[0], wide], size=(side, side), **QUICK).x_T.shape == (2, 4, 16, 16)


@pytest.mark.parametrize(("width", "height"), [(15, 13), (17, 16), (25, 25)])
def test_odd_latent_sizes(ledits: LEdits, width: int, height: int) -> None:
    """The UNet halves them rounding up and comes back."""
    factor = ledits.vae.config.factor
    inverted = ledits.invert(SAMPLES[0], size=(factor * width, factor * height), **QUICK)
    assert inverted.x_T.shape[2:] == (height, width)
    assert (ledits.edit(inverted, progress=False).latents - inverted.latents).abs().max() <= 1e-4


def test_the_result_comes_back_at_the_size_that_went_in(ledits: LEdits) -> None:
    large = Image.open(SAMPLES[0]).convert("RGB").resize((150, 131))
    inverted = ledits.invert(large, **QUICK)
    assert ledits.edit(inverted, progress=False).images[0].size == (150, 131)
    # Nothing changed, so every original pixel comes back, whatever the model's own picture looks like.
    assert difference(ledits.edit(inverted, progress=False).images[0], large) <= 1
    whole = find_square(large, ledits.native_size).whole
    assert ledits.edit(inverted, progress=False, output_size="model").images[0].size == whole


def test_a_saved_inversion_gives_the_same_edit(ledits: LEdits, inversion: Inversion, tmp_path: Path) -> None:
    inversion.save(tmp_path / "x.safetensors")
    loaded = Inversion.load(tmp_path / "x.safetensors")
    assert loaded.settings == inversion.settings
    concepts = [Concept("beard")]
    first, second = (ledits.edit(x, concepts=concepts, progress=False) for x in (inversion, loaded))
    assert torch.equal(first.latents, second.latents)
    assert first.images[0].tobytes() == second.images[0].tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_inversion_of_another_model_is_refused(inversion: Inversion) -> None:
    other = LEdits.from_pretrained("tiny", device="cpu", dtype="float32", prediction_type="v_prediction")
    with pytest.raises(InputError, match="another model"):
        other.edit(inversion, progress=False)


@pytest.mark.parametrize("damage", ["shape", "steps", "settings", "format", "nan", "seeds"])
def test_a_damaged_saved_inversion_is_refused(inversion: Inversion, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "x.safetensors"
    inversion.save(path)
    tensors = load_file(path)
    settings = {
        "fingerprint": inversion.settings.fingerprint, "schedule": config_json(inversion.settings.schedule),
        "num_steps": 10, "skip": 3, "eta": 1.0, "source": "", "source_guidance_scale": 3.5, "seeds": [0],
    }  # fmt: skip
    kind = FORMAT
    if damage == "shape":
        tensors["latents"] = tensors["latents"][:, :3].contiguous()
    elif damage == "steps":
        settings["num_steps"] = 12
    elif damage == "settings":
        settings["eta"] = float("nan")
    elif damage == "format":
        kind = "pt"
    elif damage == "nan":
        tensors["residuals"][0, 0, 0, 0, 0] = torch.nan
    elif damage == "seeds":
        settings["seeds"] = [0, 1]
    save_file(tensors, path, {kind: json.dumps(settings)})
    with pytest.raises(InputError, match=r"x\.safetensors"):
        Inversion.load(path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_steps": 0}, {"num_steps": 501}, {"num_steps": 1.5}, {"num_steps": 10, "skip": 10}, {"skip": -1},
        {"eta": 1.5}, {"eta": float("nan")}, {"seed": -1}, {"seed": 2**63}, {"seed": 1.5}, {"seed": [1, 2]},
        {"source_guidance_scale": float("inf")}, {"source": None}, {"size": (64, 4)}, {"size": 10**6},
    ],
)  # fmt: skip
def test_invert_refuses(ledits: LEdits, arguments: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        ledits.invert(SAMPLES[0], progress=False, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": float("nan")}, {"guidance_scale": 1e9}, {"momentum_scale": 1.0}, {"momentum_beta": -0.1},
        {"target": 3}, {"negative": None}, {"output_size": "huge"}, {"target": "a zebra"},
    ],
)  # fmt: skip
def test_edit_refuses(ledits: LEdits, inversion: Inversion, arguments: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        ledits.edit(inversion, progress=False, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": -1.0}, {"guidance_scale": float("nan")}, {"threshold": 1.01}, {"warmup_steps": -1},
        {"warmup_steps": 1.5}, {"cooldown_steps": True}, {"weight": -1.0}, {"reverse": 1},
    ],
)  # fmt: skip
def test_concept_refuses(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Concept("hat", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "toaster"}, "toaster"),
        ({"dtype": "int8"}, "int8"),
        ({"model": "runwayml/stable-diffusion-v1-5"}, "runwayml"),
        ({"prediction_type": "sample"}, "sample"),
    ],
)
def test_from_pretrained_refuses(arguments: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        LEdits.from_pretrained(**arguments)  # type: ignore[arg-type]


def test_a_photograph_gets_a_hint_from_the_embedded_model(ledits: LEdits) -> None:
    from skimage.data import astronaut

    with pytest.warns(UserWarning, match="Stable Diffusion checkpoint"):
        ledits.invert(astronaut(), num_steps=2, progress=False)


def test_values_that_are_not_finite_are_never_saved_as_a_picture(inversion: Inversion) -> None:
    broken = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    broken.unet.conv_out.bias.data[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(RunError, match="step 0"):
        broken.edit(inversion, progress=False)
    with pytest.raises(RunError, match="inverting"):
        broken.invert(SAMPLES[0], **QUICK)


def test_unknown_words_are_refused_with_the_known_ones(ledits: LEdits, inversion: Inversion) -> None:
    with pytest.raises(InputError, match=r"does not know 'zebra'.*sunglasses"):
        ledits.edit(inversion, concepts=[Concept("a zebra")], progress=False)


def test_a_prompt_that_is_too_long_names_what_was_dropped(ledits: LEdits, inversion: Inversion) -> None:
    prompt = " ".join(["a"] * 38 + ["red", "hat"])
    with pytest.warns(UserWarning, match="red hat"):
        ledits.edit(inversion, target=prompt, progress=False)


def test_generation_is_the_same_loop_with_drawn_residuals(ledits: LEdits) -> None:
    settings = {"num_steps": 8, "progress": False}
    result = ledits.generate("a portrait", seed=[3, 4], concepts=[Concept("hat")], **settings)
    assert [image.size for image in result.images] == [(ledits.native_size, ledits.native_size)] * 2
    assert result.masks[0].shape == (2, 16, 16)
    alone = ledits.generate("a portrait", seed=4, concepts=[Concept("hat")], **settings)
    assert (alone.latents[0] - result.latents[1]).abs().max() < 1e-3
    assert not torch.equal(alone.latents, ledits.generate("a portrait", seed=4, eta=1.0, **settings).latents)
    assert ledits.generate("a portrait", size=(96, 64), **settings).images[0].size == (96, 64)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_unet_is_compiled_where_that_is_wanted(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append({"network": self, **how}))
    ledits = LEdits.from_pretrained("tiny", device="cpu", compile=wanted)
    assert asked == ([{"network": ledits.unet, "dynamic": False}] if wanted else [])

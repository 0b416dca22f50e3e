"""The recipe of the embedded model: true captions, deterministic pictures, local ideal edits, stages that learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("dicebear", reason="the [train] extra is not installed")
pytest.importorskip("resvg_py", reason="the [train] extra is not installed")

from ledits_min.schedule import make_schedule
from ledits_min.unet import UNet
from ledits_min.vae import VAE
from ledits_min.weights.train_tiny import classifier, diffusion, export, loop, text, vae
from ledits_min.weights.train_tiny.portraits import (
    ATTRIBUTES,
    Portrait,
    caption,
    draw,
    ideal_edit,
    labels,
    load_split,
    phrases,
    render_split,
    sample_portrait,
    seeds,
    visible,
    vocabulary,
)

SIZE = vae.CONFIG.sample_size


def portraits(count: int) -> list[Portrait]:
    return [sample_portrait(name) for name in seeds("unit", count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a handful of pictures."""
    folder = tmp_path_factory.mktemp("run")
    render_split(folder / "data", "train", 16, SIZE, processes=1)
    render_split(folder / "data", "test", 4, SIZE, processes=1)
    return folder


def test_captions_tell_only_what_is_visible() -> None:
    for index, portrait in enumerate(portraits(300)):
        sentence, told = caption(portrait, Random(index))
        shown = visible(portrait)
        assert all(shown[name] == value for name, value in told.items())
        words = set(sentence.replace("gray", "grey").replace("blonde", "blond").replace(",", " ").split())
        for name in ("hair color", "hat color", "shirt", "background", "skin"):
            assert name not in told or told[name] in words
        if "sunglasses" in words and "no" not in words:
            assert shown["eyewear"] == "sunglasses"
        if told == {}:
            assert not words & {"glasses", "sunglasses", "hat", "beard", "hair", "shirt", "background", "skin"}


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if name != "hat color"])
def test_every_phrase_tells_its_attribute(name: str) -> None:
    for index, portrait in enumerate(portraits(100)):
        shown = visible(portrait)
        if name in shown:
            phrase, told = phrases(name, shown, Random(index))
            assert told[0] == name and phrase


def test_the_vocabulary_holds_every_word_of_a_caption() -> None:
    known = set(vocabulary())
    for index, portrait in enumerate(portraits(500)):
        assert set(caption(portrait, Random(index))[0].replace(",", " ").split()) <= known


def test_captions_fit_the_text_encoder() -> None:
    lengths = [len(caption(p, Random(i))[0].replace(",", " ").split()) for i, p in enumerate(portraits(1000))]
    assert max(lengths) <= text.LENGTH - 2


def test_pictures_are_deterministic_and_differ() -> None:
    first, second = portraits(2)
    np.testing.assert_array_equal(draw(first, 32), draw(sample_portrait(first.seed), 32))
    assert np.any(draw(first, 32) != draw(second, 32))


@pytest.mark.parametrize(
    ("name", "value", "rows"),
    [
        ("eyewear", "sunglasses", slice(16, 48)),
        ("mouth", "smile", slice(28, 60)),
        ("beard", "beard", slice(16, 64)),
        ("shirt", "red", slice(36, 64)),
    ],
)
def test_an_ideal_edit_changes_one_thing_where_it_is(name: str, value: str, rows: slice) -> None:
    for portrait in portraits(8):
        other = next(v for v in ATTRIBUTES[name] if v != value)
        before, after = ideal_edit(portrait, {name: other}), ideal_edit(portrait, {name: value})
        assert {k for k in ATTRIBUTES if before.attributes[k] != after.attributes[k]} == {name}
        changed = np.any(draw(before, 64) != draw(after, 64), axis=(1, 2))
        assert changed.any() and not np.delete(changed, np.arange(64)[rows]).any()


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(ValueError, match="monocle"):
        ideal_edit(portraits(1)[0], {"eyewear": "monocle"})


def test_a_hat_hides_the_hair() -> None:
    portrait = ideal_edit(portraits(1)[0], {"hat": "hat", "beard": "none"})
    assert {"hair length", "hair color"}.isdisjoint(visible(portrait))
    other = ideal_edit(portrait, {"hair color": "red" if portrait.attributes["hair color"] != "red" else "black"})
    np.testing.assert_array_equal(draw(portrait, 32), draw(other, 32))


def test_a_split_is_written_once_and_agrees_with_its_seeds(run: Path) -> None:
    pixels, shown = load_split(run / "data", "train")
    assert pixels.shape == (16, SIZE, SIZE, 3) and pixels.dtype == np.uint8
    portrait = sample_portrait("train 5")
    np.testing.assert_array_equal(pixels[5], draw(portrait, SIZE))
    assert shown[5] == visible(portrait)
    assert labels(shown).shape == (16, len(ATTRIBUTES))


@pytest.mark.parametrize("stage", ["classifier", "vae", "text"])
def test_a_stopped_stage_goes_on_as_if_it_had_not_stopped(
    run: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "CROPS", 2)  # few, because CPUs are slow in the half precision it is trained in
    monkeypatch.setattr(vae, "WHOLES", 1)
    train = {"classifier": classifier.train_classifier, "vae": vae.train_vae, "text": text.train_text}[stage]
    plan = loop.Training(steps=4, rate=1e-3)
    results = []
    for name, stops in (("whole", (4,)), ("halves", (2, 4))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data").symlink_to(run / "data")
        for stop in stops:
            train(folder, 0, replace(plan, until=stop))
        results.append(loop.ema_weights(folder / f"{stage}.safetensors"))
        line = json.loads((folder / f"{stage}.jsonl").read_text().splitlines()[-1])
        assert line["step"] == 4 and np.isfinite(line["loss"])
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=0, atol=1e-6)


def test_a_stage_out_of_time_saves_and_is_gone_on_with(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(run / "data")
    plan = loop.Training(steps=3, rate=1e-3, minutes=0.0)
    for step in (1, 2, 3):
        assert text.train_text(tmp_path, 0, plan).step == step


def test_every_crop_is_a_piece_of_its_own_picture() -> None:
    image = torch.arange(3 * 20 * 24.0).view(1, 3, 20, 24).repeat(40, 1, 1, 1) + 10_000.0 * torch.arange(40).view(
        -1, 1, 1, 1
    )
    crops = vae.crop_each(image, 8, loop.generator_at(0, 0))
    assert crops.shape == (40, 3, 8, 8)
    corners = set()
    for number, crop in enumerate(crops):
        y, x = divmod(int(crop[0, 0, 0]) - 10_000 * number, 24)
        assert torch.equal(crop, image[number, :, y : y + 8, x : x + 8])
        corners.add((y, x))
    assert len(corners) > 20


def test_the_oracle_beside_a_model_sees_what_the_trained_one_saw(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(run / "data")
    classifier.train_classifier(tmp_path, 0, loop.Training(steps=2, rate=1e-3))
    trained = classifier.load_classifier(tmp_path)
    save_file(export.halves(trained), tmp_path / classifier.ORACLE)
    image = vae.to_image(load_split(run / "data", "test")[0])
    for ours, theirs in zip(classifier.load_oracle(tmp_path)(image), trained(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


def test_whitening_keeps_the_picture_and_normalises_the_latents(run: Path) -> None:
    torch.manual_seed(0)
    model = VAE(vae.CONFIG).eval()
    pixels, _ = load_split(run / "data", "train")
    image = vae.to_image(pixels)
    with torch.no_grad():
        before = model.decode(model.encode(image))
        vae.whiten(model, pixels)
        latents = model.encode(image)
        after = model.decode(latents)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=1e-3)


def test_one_diffusion_step_lowers_the_loss_on_its_own_batch() -> None:
    torch.manual_seed(0)
    unet = UNet(diffusion.CONFIG)
    latents, context = torch.randn(4, 4, 16, 16), torch.randn(4, text.LENGTH, 128)
    alphas_cumprod = make_schedule(diffusion.SCHEDULE, 1).alphas_cumprod.float()

    def loss() -> torch.Tensor:
        return diffusion.noise_loss(unet, latents, context, alphas_cumprod, loop.generator_at(0, 0))

    state = loop.State(unet, loop.Training(steps=10, rate=1e-3, warmup=1))
    before = loss()
    state.update(before)
    with torch.no_grad():
        assert loss() < before


def test_the_tokenizer_ignores_case_and_punctuation_and_knows_no_other_word() -> None:
    tokenizer = text.build_tokenizer()
    assert tokenizer.tokenize("A red hat, clean-shaven.") == ["a", "red", "hat", "clean", "shaven"]
    assert tokenizer.tokenize("spaceship") == [text.UNKNOWN]
    ids = text.tokenize(tokenizer, ["beard", "a " * 100])
    assert ids.shape == (2, text.LENGTH) and int(ids[1, -1]) == tokenizer.eos_token_id

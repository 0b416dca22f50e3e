"""The plain engine and the fast one through the public face: the same edit, progress, retries and failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ledits_min import Concept, InputError, Inversion, LEdits, Progress, PromptToPrompt, Result, Stopped
from ledits_min.errors import RunError

SAMPLES = sorted((Path(__file__).parents[1] / "weights/tiny/samples").glob("*.png"))
QUICK = {"num_steps": 10, "skip": 3, "progress": False}
ENGINES = ("plain", "fast")
SHORT: dict[str, Any] = {"num_steps": 6, "skip": 2, "progress": False}
HAIR = "a portrait with long brown hair"
MOMENTUM: dict[str, Any] = {
    "target": "a portrait with a beard",
    "guidance_scale": 6.0,
    "negative": "hat",
    "concepts": [Concept("sunglasses"), Concept("smile", threshold=0.8, warmup_steps=2, reverse=True)],
    "momentum_scale": 0.3,
}
BLOND: dict[str, Any] = {"target": "a portrait with long blond hair", "attention": PromptToPrompt()}
Use = Callable[[LEdits], tuple[Inversion | None, Result]]


def apart(pictures: int, **wish: Any) -> Use:
    def use(ledits: LEdits) -> tuple[Inversion | None, Result]:
        inversion = ledits.invert(SAMPLES[:pictures], HAIR, seed=list(range(pictures)), **SHORT)
        return inversion, ledits.edit(inversion, trace=True, progress=False, **wish)

    return use


USES: dict[str, Use] = {
    "no concept": apart(1, target="a portrait with a beard"),
    "two concepts, momentum, negative prompt": apart(1, **MOMENTUM),
    "a batch of two": apart(2, **MOMENTUM),
    "Prompt-to-Prompt": apart(1, **BLOND),
    "Prompt-to-Prompt, two pictures, a concept": apart(2, **BLOND, concepts=[Concept("sunglasses")]),
    "in one go": lambda ledits: ledits.invert_and_edit(SAMPLES[0], HAIR, trace=True, **SHORT, **MOMENTUM),
    "generation": lambda ledits: (
        None,
        ledits.generate(HAIR, num_steps=4, eta=0.5, concepts=[Concept("hat")], seed=[1, 2], trace=True, progress=False),
    ),
}


@pytest.fixture(scope="module")
def inversion(ledits: LEdits) -> Inversion:
    return ledits.invert(SAMPLES[0], **QUICK)


@pytest.fixture(scope="module")
def plain() -> LEdits:
    return LEdits.from_pretrained("tiny", device="cpu", dtype="float32", engine="plain")


@pytest.fixture(params=ENGINES)
def either(request: pytest.FixtureRequest, ledits: LEdits, plain: LEdits) -> LEdits:
    return plain if request.param == "plain" else ledits


@pytest.fixture(params=ENGINES)
def half(request: pytest.FixtureRequest) -> Iterator[LEdits]:
    with LEdits.from_pretrained("tiny", device="cpu", dtype="bfloat16", engine=request.param) as ledits:
        ledits.vae.float()  # in half precision it takes many seconds on a CPU that does not compute in it
        yield ledits


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", USES)
def test_the_plain_engine_gives_what_the_fast_one_gives(ledits: LEdits, plain: LEdits, name: str) -> None:
    (inversion, wanted), (other, found) = (USES[name](engine) for engine in (plain, ledits))
    if inversion is not None and other is not None:
        assert torch.equal(other.x_T, inversion.x_T) and other.settings == inversion.settings
        assert relative(other.residuals, inversion.residuals) < 1e-5
    assert relative(found.latents, wanted.latents) < 1e-5
    for fast, slow in zip(found.images, wanted.images, strict=True):
        assert np.abs(np.asarray(fast, dtype=int) - np.asarray(slow, dtype=int)).max() <= 1
    assert [mask.any() for mask in found.masks] == [True] * len(found.masks)
    torch.testing.assert_close(found.masks, wanted.masks, rtol=0.0, atol=1e-6)
    assert len(found.trace) == len(wanted.trace) == 4
    for ours, theirs in zip(found.trace, wanted.trace, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    phases = {"in one go": [], "generation": ["generating"]}.get(name, ["inverting", "editing"])
    counted = [[engine.runner.evaluations[phase] for phase in phases] for engine in (plain, ledits)]
    assert counted[0] == counted[1]


def test_both_engines_agree_in_bfloat16_as_closely_as_it_can_tell() -> None:
    """Sums are rounded in another order: without a mask, which a last bit can flip, latents differ by some 1.4 %."""
    results = []
    for engine in ENGINES:
        with LEdits.from_pretrained("tiny", device="cpu", dtype="bfloat16", engine=engine) as ledits:
            ledits.vae.float()
            results.append(USES["no concept"](ledits)[1].latents)
    error = relative(*results)
    print(f"bfloat16, plain against fast: {error:.1e}")
    assert error < 5e-2


def test_an_engine_has_one_of_two_names() -> None:
    with pytest.raises(InputError, match="engine is 'slow'; the choices are fast, plain"):
        LEdits.from_pretrained("tiny", engine="slow")


@pytest.mark.parametrize("attention", [None, PromptToPrompt()])
def test_either_engine_tells_of_its_progress_and_stops(either: LEdits, attention: PromptToPrompt | None) -> None:
    told: list[Progress] = []
    inversion = either.invert(SAMPLES[0], HAIR, callback=told.append, **SHORT)
    done = [progress.done for progress in told]
    assert done == sorted(set(done)) and done[-1] == told[-1].total == 2 * 4
    assert {(progress.phase, progress.latents) for progress in told} == {("inverting", None)}

    wish: dict[str, Any] = {**BLOND, "attention": attention, "trace": True, "progress": False}
    told.clear()
    result = either.edit(inversion, callback=told.append, **wish)
    assert [(p.phase, p.done, p.total) for p in told] == [("editing", i, 4) for i in range(1, 5)]
    assert [p.trace for p in told] == result.trace
    assert told[-1].latents is not None and torch.equal(told[-1].latents, result.latents)
    with pytest.raises(Stopped, match="editing: stopped by the callback after 2 of 4 steps"):
        either.edit(inversion, callback=lambda progress: progress.done == 2, **wish)
    with pytest.raises(Stopped, match="inverting: stopped by the callback after"):
        either.invert(SAMPLES[0], HAIR, callback=lambda progress: True, **SHORT)


def test_either_engine_tries_again_in_float32(half: LEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    inversion = half.invert(SAMPLES[0], **SHORT)
    forward = half.unet.forward

    def overflowing(*given: Any, **more: Any) -> torch.Tensor:
        prediction: torch.Tensor = forward(*given, **more)
        return prediction * (1.0 if half.dtype == torch.float32 else torch.inf)

    monkeypatch.setattr(half.unet, "forward", overflowing)
    once_more = r"{}: the prediction for '' .* at step 0 \(t = 499\) in bfloat16; once more in float32"
    with pytest.warns(UserWarning, match=once_more.format("inverting")):
        again = half.invert(SAMPLES[0], **SHORT)
    assert (again.residuals - inversion.residuals).abs().max() < 0.15
    with pytest.warns(UserWarning, match=once_more.format("editing")):
        result = half.edit(inversion, trace=True, progress=False)
    assert result.latents.isfinite().all() and len(result.trace) == 4
    with pytest.warns(UserWarning, match="once more"), pytest.raises(Stopped) as caught:
        half.edit(inversion, callback=lambda progress: half.dtype == torch.float32, progress=False)
    assert half.dtype == torch.bfloat16, caught  # the exception is still held, and with it what it came through


@pytest.mark.parametrize("engine", ENGINES)
def test_either_engine_names_what_is_not_finite(engine: str, inversion: Inversion) -> None:
    broken = LEdits.from_pretrained("tiny", device="cpu", dtype="float32", engine=engine)
    broken.unet.conv_out.bias.data[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(RunError) as caught:
        broken.edit(inversion, concepts=[Concept("hat", warmup_steps=0)], progress=False)
    assert str(caught.value) == (
        "editing: the prediction for '' holds values that are not finite at step 0 (t = 601); "
        "lower the guidance scales, or use a checkpoint that is not damaged"
    )
    with pytest.raises(RunError, match=r"inverting: the prediction for '' .* at step 0 \(t = 601\); lower"):
        broken.invert(SAMPLES[0], **QUICK)


@pytest.mark.parametrize("field", ["guidance_scale", "weight"])
def test_a_concept_without_strength_is_the_limit_of_a_weak_one(either: LEdits, field: str) -> None:
    """With a late warm-up it holds the momentum back, at no cost."""
    inversion = either.invert(SAMPLES[0], num_steps=12, skip=0, progress=False)

    def edited(*more: Concept) -> Result:
        concepts = [Concept("sunglasses", warmup_steps=0), *more]
        return either.edit(inversion, concepts=concepts, momentum_scale=0.3, progress=False)

    little, nothing = (edited(Concept("beard", warmup_steps=10, **{field: s})) for s in (1e-6, 0.0))  # type: ignore[arg-type]
    assert either.runner.evaluations["editing"] == 12 * 2  # of which none is for the beard
    assert (nothing.latents - little.latents).abs().max() < 1e-4
    assert not nothing.masks[1].any() and little.masks[1].any()
    assert (nothing.latents - edited().latents).abs().max() > 1e-3

"""The engine over real networks: equal to the plain loops in every precision, what is done when a run goes wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ledits_min import Concept, InputError, Inversion, LEdits, Progress, PromptToPrompt, Stopped
from ledits_min import edit as plain
from ledits_min.config import SD15_SCHEDULE, SD15_UNET
from ledits_min.engine.denoiser import Denoiser, plain_eps_model
from ledits_min.engine.fast_networks import FastUNet, accelerate
from ledits_min.errors import RunError
from ledits_min.guidance import EditSettings
from ledits_min.inversion import draw_noise, eps_from_v
from ledits_min.schedule import make_schedule
from ledits_min.text import Context
from ledits_min.unet import UNet

SAMPLES = sorted((Path(__file__).parents[2] / "weights/tiny/samples").glob("*.png"))
SAMPLE = SAMPLES[0]
QUICK: dict[str, Any] = {"num_steps": 10, "skip": 3, "progress": False}
SMALL = {**QUICK, "num_steps": 5, "skip": 1, "size": 64}  # where a CPU is slow in half precision
EDIT: dict[str, Any] = {"target": "a portrait", "guidance_scale": 3.0, "progress": False}
CONCEPTS = [Concept("sunglasses"), Concept("smile", warmup_steps=2, cooldown_steps=5)]
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)
BOUNDS = {"float32": 2e-4, "bfloat16": 0.15, "float16": 0.05}


def load(dtype: str = "float32") -> LEdits:
    return LEdits.from_pretrained("tiny", device="cpu", dtype=dtype)


def plain_unet(ledits: LEdits) -> UNet:
    """Its UNet as unet.py writes it, nothing of it accelerated, with the same weights."""
    unet = UNet(ledits.unet.config)
    unet.load_state_dict(ledits.unet.state_dict(), strict=True, assign=True)
    return unet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ledits() -> LEdits:
    return load()


@pytest.fixture(scope="module")
def inversion(ledits: LEdits) -> Inversion:
    return ledits.invert(SAMPLE, source="a portrait", **QUICK)


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUNDS)
def test_equal_to_the_plain_loops(dtype: str) -> None:
    """Whatever the precision, batches change rounding and nothing else."""
    ledits = load(dtype)
    quick = QUICK if dtype == "float32" else SMALL
    inversion = ledits.invert(SAMPLE, source="a portrait", **quick)
    settings = inversion.settings
    contexts = {text: ledits.text.encode([text]) for text in ("", "a portrait", "sunglasses", "smile")}
    noise = draw_noise(settings.seeds, len(inversion.residuals), tuple(inversion.latents.shape[1:]))
    unet = plain_unet(ledits)
    eps_model = plain_eps_model(unet, settings.make_schedule(), ledits.schedule.prediction_type)
    x_t, residuals = plain.invert(eps_model, contexts, inversion.latents, noise, settings)
    assert torch.equal(x_t, inversion.x_T)
    assert (residuals - inversion.residuals).abs().max() < BOUNDS[dtype]

    terms = tuple(concept.resolve(ledits.defaults) for concept in CONCEPTS)
    wanted = EditSettings("a portrait", 3.0, concepts=terms)
    expected = plain.edit(eps_model, contexts, inversion.x_T, inversion.residuals, settings, wanted)
    found = ledits.edit(inversion, concepts=CONCEPTS, **EDIT)
    off = (found.latents - expected).norm() / expected.norm()
    print(f"{dtype}: edited latents differ by {float(off):.1e} relative to the plain loop")
    assert off < BOUNDS[dtype]
    again = ledits.edit(inversion, concepts=CONCEPTS, **EDIT)
    assert torch.equal(found.latents, again.latents)


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUNDS)
def test_in_one_pass_it_is_what_two_calls_give(dtype: str) -> None:
    ledits = load(dtype)
    quick = QUICK if dtype == "float32" else SMALL
    first = ledits.invert(SAMPLE, source="a portrait", **quick)
    second = ledits.edit(first, concepts=CONCEPTS, trace=True, **EDIT)
    inversion, result = ledits.invert_and_edit(
        SAMPLE, source="a portrait", concepts=CONCEPTS, trace=True, **{**quick, **EDIT}
    )
    assert torch.equal(inversion.x_T, first.x_T) and torch.equal(inversion.latents, first.latents)
    assert inversion.settings == first.settings
    assert (inversion.residuals - first.residuals).abs().max() < BOUNDS[dtype]
    off = (result.latents - second.latents).norm() / second.latents.norm()
    print(f"{dtype}: in one pass edited latents differ by {float(off):.1e} relative to two calls")
    assert off < BOUNDS[dtype]
    assert [entry["t"] for entry in result.trace] == [entry["t"] for entry in second.trace]
    assert [list(entry["eps_rms"]) for entry in result.trace] == [list(entry["eps_rms"]) for entry in second.trace]
    for one, other in zip(result.masks, second.masks, strict=True):
        assert (one - other).abs().mean() < 0.02


def test_in_one_pass_several_pictures_and_noise_are_as_in_two_calls(ledits: LEdits) -> None:
    pictures, generator = SAMPLES[:2], torch.Generator().manual_seed(3)
    noise = torch.randn(
        7, 2, *ledits.invert(SAMPLE, num_steps=1, progress=False).latents.shape[1:], generator=generator
    )
    begin: dict[str, Any] = {"noise": noise, "source": "a portrait", "size": (128, 96)}
    noise = noise[..., :12, :]
    begin["noise"] = noise
    first = ledits.invert(pictures, **begin, **QUICK)
    second = ledits.edit(first, concepts=CONCEPTS, momentum_scale=0.3, negative="hat", **EDIT)
    inversion, result = ledits.invert_and_edit(
        pictures, concepts=CONCEPTS, momentum_scale=0.3, negative="hat", **begin, **{**QUICK, **EDIT}
    )
    assert (inversion.residuals - first.residuals).abs().max() < BOUNDS["float32"]
    for one, other in zip(result.latents, second.latents, strict=True):
        assert (one - other).norm() / other.norm() < 1e-3
    assert [image.size for image in result.images] == [image.size for image in second.images]


def test_in_one_pass_a_reconstruction_is_the_inversion_alone(ledits: LEdits) -> None:
    inversion, result = ledits.invert_and_edit([SAMPLE, SAMPLE], seed=[1, 2], **QUICK)
    assert (result.latents - inversion.latents).abs().max() < 1e-4
    assert ledits.runner.evaluations["inverting and editing"] == 2 * 7


def test_in_one_pass_prompt_to_prompt_and_steps_are_as_in_two(ledits: LEdits) -> None:
    prompts: dict[str, Any] = {"source": "short hair", "target": "long hair", "guidance_scale": 3.0}
    inversion, result = ledits.invert_and_edit(SAMPLE, attention=PromptToPrompt(), **prompts, **QUICK)
    again = ledits.edit(inversion, "long hair", 3.0, attention=PromptToPrompt(), progress=False)
    assert torch.equal(result.latents, again.latents)
    told: list[Progress] = []
    ledits.invert_and_edit(SAMPLE, concepts=CONCEPTS, callback=told.append, **QUICK)
    assert [(p.phase, p.done, p.total) for p in told] == [("inverting and editing", i, 7) for i in range(1, 8)]
    with pytest.raises(Stopped, match="inverting and editing: stopped by the callback after 1 of 7 steps"):
        ledits.invert_and_edit(SAMPLE, callback=lambda progress: True, **QUICK)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"output_size": "huge"}, "output_size is 'huge'"),
        ({"attention": 0.6}, "attention is float"),
        ({"attention": PromptToPrompt()}, "the source prompt is empty"),
        ({"attention": PromptToPrompt(), "source": None}, "source is NoneType"),
        ({"attention": PromptToPrompt(), "source": "a", "target": "b", "guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"negative": None}, "negative is NoneType"),
        ({"skip": 99}, "skip"),
    ],
)
def test_in_one_pass_what_is_wrong_is_refused_before_the_picture_is_read(
    ledits: LEdits, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(ledits.vae, "encode", None)
    with pytest.raises(InputError, match=says):
        ledits.invert_and_edit(SAMPLE, **{**QUICK, **wrong})


def test_what_was_evaluated_is_told(ledits: LEdits) -> None:
    ledits.runner.evaluations.clear()
    inversion = ledits.invert([SAMPLE, SAMPLE], source="a portrait", **QUICK)
    ledits.edit(inversion, concepts=CONCEPTS, **EDIT)
    # Both prompts, sunglasses after its first step, smile in steps 2 to 4; two pictures.
    assert ledits.runner.evaluations == {"inverting": 2 * 7 * 2, "editing": 2 * (7 * 2 + 6 + 3)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rows", [0, 1, 2], ids=["nothing added", "one added", "one added an image"])
@pytest.mark.parametrize("inputs", [[0, 1, 2, 3], [0, 1, 1, 2]], ids=["own", "shared"])
@torch.no_grad()
def test_what_is_computed_once_is_what_the_unet_computes(prediction_type: str, rows: int, inputs: list[int]) -> None:
    torch.manual_seed(0)
    config = replace(
        SD15_UNET,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        num_attention_heads=(2, 4),
        cross_attention_dim=12,
        norm_num_groups=8,
        addition_time_embed_dim=4 if rows else 0,
        projection_class_embeddings_input_dim=10 if rows else 0,
    )
    unet = UNet(config).eval()
    fast = cast(FastUNet, accelerate(copy.deepcopy(unet)))
    schedule = make_schedule(SD15_SCHEDULE, 9, 2)
    contexts = [Context(torch.randn(1, 5, 12), torch.randn(rows, 10) if rows else None) for _ in range(3)]
    network = Denoiser(fast, contexts, schedule, prediction_type, compiled=False)
    steps, texts, images = torch.tensor([0, 3, 3, 6]), torch.tensor([2, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    x_t = torch.randn(max(inputs) + 1, 4, 6, 7)
    call = x_t, torch.tensor(inputs), steps, texts, images
    found = network(*call)
    x_t = x_t[inputs]
    for i in range(4):
        context, t = contexts[texts[i]], schedule.timesteps[steps[i]].view(1)
        added = None if context.added is None else context.added[int(images[i]) % rows][None]
        wanted = unet(x_t[i : i + 1], t, context.tokens, added)
        if prediction_type == "v_prediction":
            wanted = eps_from_v(wanted, x_t[i : i + 1], schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1))
        torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-4, atol=1e-5)

    # A compiled network is compiled for every shape: it is given each row's own input.
    seen: list[int] = []

    def compiled(x_t: Tensor, *more: Any, **named: Any) -> Tensor:
        seen.append(len(x_t))
        return FastUNet.forward(fast, x_t, *more, **named)

    fast._compiled_call_impl = compiled
    again = Denoiser(fast, contexts, schedule, prediction_type, compiled=True)(*call)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)
    assert seen == [4]


def limit(monkeypatch: pytest.MonkeyPatch, network: Any, most: float, error: Exception) -> None:
    """`network` has memory for inputs of at most `most` values, an input that rows share counted for each of them."""
    forward = network.forward

    def limited(x: Tensor, *more: Any, **rows: Tensor | None) -> Tensor:
        shared = rows.get("rows")
        if x.numel() * (1 if shared is None else len(shared) / len(x)) > most:
            raise error
        return forward(x, *more, **rows)

    monkeypatch.setattr(network, "forward", limited)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
class TestOutOfMemory:
    def test_the_unet_goes_on_with_fewer_at_a_time(
        self, ledits: LEdits, inversion: Inversion, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        expected = ledits.edit(inversion, concepts=CONCEPTS, **EDIT).latents
        limit(monkeypatch, ledits.unet, inversion.latents.numel(), error)
        with pytest.warns(UserWarning, match="inverting: out of memory with 14 evaluations per call"):
            again = ledits.invert(SAMPLE, source="a portrait", **QUICK)
        assert (again.residuals - inversion.residuals).abs().max() < BOUNDS["float32"]
        with pytest.warns(UserWarning, match="editing: out of memory with 2 evaluations per call; going on with 1"):
            found = ledits.edit(inversion, concepts=CONCEPTS, **EDIT).latents
        assert (found - expected).norm() / expected.norm() < BOUNDS["float32"]
        assert ledits.runner.evaluations["inverting"] == 2 * 7
        assert ledits.runner.evaluations["editing"] == 7 * 2 + 6 + 3

    def test_the_autoencoder_goes_on_in_tiles(
        self, ledits: LEdits, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        size = 3 * ledits.native_size
        inverted = ledits.invert(SAMPLE, size=size, num_steps=2, skip=1, progress=False)
        expected = ledits.runner.decode(inverted.latents)
        limit(monkeypatch, ledits.vae.encoder, 3 * (size // 2) ** 2, error)
        limit(monkeypatch, ledits.vae.decoder, inverted.latents.numel() / 4, error)
        with pytest.warns(UserWarning, match=f"encoding: out of memory; going on in tiles of {size // 2} pixels"):
            again = ledits.invert(SAMPLE, size=size, num_steps=2, skip=1, progress=False)
        assert (again.latents - inverted.latents).norm() / inverted.latents.norm() < 0.1
        with pytest.warns(UserWarning, match=f"decoding: out of memory; going on in tiles of {size // 2} pixels"):
            found = ledits.runner.decode(inverted.latents)
        psnr = 10.0 * torch.log10(4.0 / (found - expected).square().mean())
        print(f"tiled decoding: {float(psnr):.1f} dB against untiled")
        assert psnr > 28.0

    @pytest.mark.parametrize("phase", ["encoding", "inverting", "editing", "decoding"])
    def test_where_nothing_helps_the_size_that_would_fit_is_named(
        self, ledits: LEdits, inversion: Inversion, monkeypatch: pytest.MonkeyPatch, error: Exception, phase: str
    ) -> None:
        networks = {"encoding": ledits.vae.encoder, "decoding": ledits.vae.decoder}
        limit(monkeypatch, networks.get(phase, ledits.unet), 0, error)
        run: Callable[[], object] = lambda: ledits.edit(inversion, **EDIT)  # noqa: E731
        if phase in ("encoding", "inverting"):
            run = lambda: ledits.invert(SAMPLE, **QUICK)  # noqa: E731
        with (
            pytest.raises(RunError, match=rf"^{phase}: out of memory .* --size \d+ would fit$") as caught,
            pytest.warns(UserWarning, match="out of memory"),
        ):
            run()
        assert "\n" not in str(caught.value)


def overflow_in_half_precision(ledits: LEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ledits.unet.forward

    def overflowing(x_t: Tensor, time: Tensor, *more: Any, **rows: Any) -> Tensor:
        if ledits.dtype == torch.float32:
            return forward(x_t, time, *more, **rows)
        return x_t.new_full((len(time), *x_t.shape[1:]), torch.inf)

    monkeypatch.setattr(ledits.unet, "forward", overflowing)


def test_values_that_half_precision_cannot_hold_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    half = load("bfloat16")
    half.vae.float()  # it is not what overflows here, and a CPU may be slow in bfloat16
    inversion = half.invert(SAMPLE, **QUICK)
    overflow_in_half_precision(half, monkeypatch)
    with pytest.warns(
        UserWarning, match="inverting: the prediction for '' .* step 0 .* in bfloat16; once more in float32"
    ):
        again = half.invert(SAMPLE, **QUICK)
    assert (again.residuals - inversion.residuals).abs().max() < 0.15
    with pytest.warns(UserWarning, match="editing: .* once more in float32"):
        found = half.edit(inversion, trace=True, progress=False)
    assert found.latents.isfinite().all()
    executed = make_schedule(inversion.settings.schedule, 10).timesteps[3:]
    assert [entry["t"] for entry in found.trace] == executed.tolist()
    assert half.dtype == torch.bfloat16


# --- Prompt-to-Prompt -----------------------------------------------------------------------------------------------

LENT: dict[str, Any] = {"target": "long hair", "guidance_scale": 3.0, "attention": PromptToPrompt(), "progress": False}


@pytest.fixture(scope="module")
def pair(ledits: LEdits) -> Inversion:
    return ledits.invert(SAMPLES[:2], source="short hair", **QUICK)


def test_prompt_to_prompt_is_the_plain_engines(ledits: LEdits, pair: Inversion) -> None:
    """Two pictures, a concept and a negative prompt."""
    plainly = LEdits.from_pretrained("tiny", device="cpu", dtype="float32", engine="plain")
    more = {"negative": "hat", "concepts": CONCEPTS[:1]}
    found, expected = ledits.edit(pair, **LENT, **more), plainly.edit(pair, **LENT, **more)
    assert (found.latents - expected.latents).norm() / expected.latents.norm() < BOUNDS["float32"]
    for one, other in zip(found.masks, expected.masks, strict=True):
        assert (one - other).abs().mean() < 0.02
    alone = ledits.edit(pair, **{**LENT, "attention": None}, **more)
    assert (found.latents - alone.latents).norm() / alone.latents.norm() > 100 * BOUNDS["float32"]


def test_what_prompt_to_prompt_evaluates_is_told(ledits: LEdits, pair: Inversion) -> None:
    told: list[Progress] = []
    ledits.edit(pair, **LENT, callback=told.append)
    assert [(p.phase, p.done, p.total) for p in told] == [("editing", i, 7) for i in range(1, 8)]
    # The empty prompt and the target at every step; the source's own two in the first int(0.6 (10 + 1)).
    assert ledits.runner.evaluations["editing"] == 2 * (7 * 2 + 6 * 2)


def test_prompt_to_prompt_goes_on_with_fewer_at_a_time(
    ledits: LEdits, pair: Inversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ledits.edit(pair, **LENT).latents
    limit(monkeypatch, ledits.unet, pair.latents.numel(), OUT_OF_MEMORY[0])  # of a pair
    with pytest.warns(UserWarning, match="editing: out of memory with 8 evaluations per call; going on with 4"):
        found = ledits.edit(pair, **LENT).latents
    assert (found - expected).norm() / expected.norm() < BOUNDS["float32"]


def test_prompt_to_prompt_is_repeated_in_float32(
    ledits: LEdits, pair: Inversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's row begins again, too; progress counts from the start."""
    half = load("bfloat16")
    half.vae.float()
    overflow_in_half_precision(half, monkeypatch)
    told: list[int] = []
    with pytest.warns(UserWarning, match="editing: .* 'short hair' .* step 0 .* in bfloat16; once more in float32"):
        found = half.edit(pair, **LENT, callback=lambda progress: told.append(progress.done)).latents
    expected = ledits.edit(pair, **LENT).latents
    off = (found - expected).norm() / expected.norm()
    print(f"repeated in float32 with weights of bfloat16: {float(off):.1e} from float32")
    assert off < 0.1
    assert told == [*range(1, 8), *range(1, 8)] and half.dtype == torch.bfloat16


def test_a_repetition_that_is_stopped_leaves_the_weights_as_they_were(
    pair: Inversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = load("bfloat16")
    overflow_in_half_precision(half, monkeypatch)
    seen: list[torch.dtype] = []

    def stop(progress: Progress) -> bool:
        seen.append(half.dtype)
        return half.dtype == torch.float32

    def edit() -> None:
        try:
            half.edit(pair, "long hair", progress=False, callback=stop)
        except Stopped:
            seen.append(half.dtype)  # here already, and not when the exception is forgotten

    with pytest.warns(UserWarning, match="once more in float32"):
        edit()
    assert seen == [torch.bfloat16] * 7 + [torch.float32, torch.bfloat16]

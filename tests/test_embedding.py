"""LEdits inside another program: callbacks, stopping, threads, moving, closing, silence."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

import ledits_min
from ledits_min import Concept, InputError, Inversion, LEdits, Progress, PromptToPrompt, Result, Stopped

PORTRAIT = Path(__file__).parents[1] / "weights/tiny/samples/portrait1.png"
STEPS, SKIP = 6, 2
CONCEPTS = [Concept("sunglasses", warmup_steps=0)]


@pytest.fixture(scope="module")
def inversion(ledits: LEdits) -> Inversion:
    return ledits.invert(PORTRAIT, num_steps=STEPS, skip=SKIP)


def test_the_inversion_tells_of_every_call_of_the_unet(ledits: LEdits) -> None:
    told: list[Progress] = []
    ledits.invert(PORTRAIT, source="portrait", num_steps=STEPS, skip=SKIP, callback=told.append)
    done = [progress.done for progress in told]
    assert {progress.phase for progress in told} == {"inverting"}
    assert done == sorted(set(done)) and done[-1] == told[-1].total == 2 * (STEPS - SKIP)
    assert all(progress.latents is None for progress in told)


@pytest.mark.parametrize("trace", [False, True])
def test_the_edit_tells_of_every_step(ledits: LEdits, inversion: Inversion, trace: bool) -> None:
    told: list[Progress] = []
    result = ledits.edit(inversion, concepts=CONCEPTS, trace=trace, callback=told.append)
    silent = ledits.edit(inversion, concepts=CONCEPTS)
    assert [(p.phase, p.done, p.total) for p in told] == [("editing", i, 4) for i in range(1, 5)]
    assert [p.trace for p in told] == (result.trace if trace else [None] * 4)
    last = told[-1].latents
    assert last is not None and torch.equal(last, result.latents)
    assert torch.equal(result.latents, silent.latents)


def test_what_a_callback_is_handed_is_its_own(ledits: LEdits, inversion: Inversion) -> None:
    def scribble(progress: Progress) -> None:
        assert progress.latents is not None
        progress.latents.zero_()

    scribbled = ledits.edit(inversion, concepts=CONCEPTS, callback=scribble)
    assert torch.equal(scribbled.latents, ledits.edit(inversion, concepts=CONCEPTS).latents)


def test_prompt_to_prompt_and_generation_tell_too(ledits: LEdits) -> None:
    told: list[Progress] = []
    source = ledits.invert(PORTRAIT, source="short black hair", num_steps=STEPS, skip=SKIP)
    ledits.edit(source, target="short blond hair", attention=PromptToPrompt(), callback=told.append)
    assert [p.done for p in told] == [1, 2, 3, 4]
    told.clear()
    ledits.generate("portrait", num_steps=3, callback=told.append)
    assert [(p.phase, p.done) for p in told] == [("generating", i) for i in (1, 2, 3)]


@pytest.mark.parametrize("attention", [None, PromptToPrompt()])
def test_a_callback_stops_an_edit(ledits: LEdits, attention: PromptToPrompt | None) -> None:
    source = ledits.invert(PORTRAIT, source="short black hair", num_steps=STEPS, skip=SKIP)
    seen: list[int] = []

    def stop_at_two(progress: Progress) -> bool:
        seen.append(progress.done)
        return progress.done == 2

    with pytest.raises(Stopped, match="after 2 of 4 steps"):
        ledits.edit(source, target="short blond hair", attention=attention, callback=stop_at_two)
    assert seen == [1, 2]


def test_a_callback_stops_an_inversion(ledits: LEdits) -> None:
    with pytest.raises(Stopped, match="inverting: stopped by the callback after"):
        ledits.invert(PORTRAIT, num_steps=STEPS, skip=SKIP, callback=lambda progress: True)


def test_an_editor_a_thread(inversion: Inversion) -> None:
    """Editors share nothing: side by side they give what they give alone."""
    editors = [LEdits.from_pretrained("tiny", device="cpu", dtype="float32") for _ in range(2)]
    concepts = [[Concept("sunglasses", warmup_steps=0)], [Concept("beard", warmup_steps=0)]]
    alone = [editor.edit(inversion, concepts=wanted).latents for editor, wanted in zip(editors, concepts, strict=True)]
    together: dict[int, Tensor] = {}

    def work(i: int) -> None:
        together[i] = editors[i].edit(inversion, concepts=concepts[i]).latents

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])
    assert editors[0].runner.evaluations == {"editing": 4 * 2}


def test_nothing_is_printed(ledits: LEdits, capfd: pytest.CaptureFixture[str]) -> None:
    ledits.edit(ledits.invert(PORTRAIT, num_steps=2, skip=0), concepts=CONCEPTS)
    assert capfd.readouterr() == ("", "")


def test_nothing_global_is_changed(ledits: LEdits) -> None:
    """What a host program has set, random numbers included, is as it was; so are callers of other libraries."""

    def state() -> dict[str, object]:
        return {
            "random": torch.get_rng_state().tolist(),
            "python random": random.getstate(),
            "numpy random": str(np.random.get_state()),
            "gradients": torch.is_grad_enabled(),
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "filters": list(warnings.filters),
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "levels": {name: logging.getLogger(name).level for name in ("", "transformers", "torch", "PIL")},
            "signals": signal.getsignal(signal.SIGINT),
        }

    before = state()
    ledits.edit(ledits.invert(PORTRAIT, num_steps=2, skip=0), concepts=CONCEPTS)
    ledits.generate("portrait", num_steps=2)
    LEdits.from_pretrained("tiny", device="cpu", dtype="bfloat16").close()
    assert state() == before


def test_the_public_names_are_typed() -> None:
    """A type checker that finds py.typed reads these; mypy --strict proves the inside."""
    assert resources.files("ledits_min").joinpath("py.typed").is_file()
    for name in ledits_min.__all__:
        thing = getattr(ledits_min, name)
        own = [value for key, value in vars(thing).items() if inspect.isfunction(value) and key[0] != "_"]
        for method in [*own, *filter(None, [vars(thing).get("__init__")])]:
            _, *parameters = inspect.signature(method).parameters.values()
            assert all(each.annotation is not each.empty for each in parameters), (name, method)
    assert get_type_hints(LEdits.edit)["return"] is Result and get_type_hints(LEdits.invert)["return"] is Inversion


def test_moving_changes_the_dtype_of_every_network(inversion: Inversion) -> None:
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    exact = ledits.edit(inversion, concepts=CONCEPTS).latents
    assert ledits.to("cpu") is ledits and ledits.dtype == torch.float32
    assert torch.equal(ledits.edit(inversion, concepts=CONCEPTS).latents, exact)
    ledits.to("cpu", "bfloat16")
    networks = (ledits.unet, ledits.vae, ledits.text.model)  # type: ignore[union-attr]
    assert {parameter.dtype for network in networks for parameter in network.parameters()} == {torch.bfloat16}
    rounded = ledits.edit(inversion, concepts=CONCEPTS).latents
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.1
    with pytest.raises(InputError, match="not available"):
        ledits.to("cuda:99")


def test_a_wider_autoencoder_stays_wide() -> None:
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="bfloat16")
    ledits.vae.float()
    ledits.to("cpu", "float16")
    assert next(ledits.vae.parameters()).dtype == torch.float32 and ledits.dtype == torch.float16


def tensor_bytes() -> int:
    """Of all tensors that anybody in this process can still reach, each storage once."""
    gc.collect()
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if type(found) in (Tensor, torch.nn.Parameter) and found.device.type == "cpu"
    }
    return sum(storages.values())


def test_closing_gives_the_memory_back(inversion: Inversion) -> None:
    before = tensor_bytes()
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    ledits.edit(inversion, concepts=CONCEPTS)
    held = tensor_bytes() - before
    assert held > 30e6
    ledits.close()
    assert tensor_bytes() - before < 0.01 * held


def test_closing_frees_the_weights_and_refuses_more(inversion: Inversion) -> None:
    with LEdits.from_pretrained("tiny", device="cpu", dtype="float32") as ledits:
        unet = ledits.unet  # somebody still holds a network
        assert ledits.edit(inversion).images
    assert all(p.is_meta for network in (unet, ledits.vae, ledits.text.model) for p in network.parameters())  # type: ignore[union-attr]
    for use in (lambda: ledits.edit(inversion), lambda: ledits.invert(PORTRAIT), lambda: ledits.generate("portrait")):
        with pytest.raises(InputError, match="closed"):
            use()


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("phase", ["invert", "edit", "invert_and_edit", "generate"])
def test_closing_during_a_run_stops_it(inversion: Inversion, engine: str, phase: str) -> None:
    """In another thread; what the run uses is there until it has stopped, and gone then."""
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32", engine=engine)
    begun, closed, ends = threading.Event(), threading.Event(), list[Exception]()

    def wait(progress: Progress) -> None:
        begun.set()
        assert closed.wait(60)

    runs: dict[str, Callable[[], object]] = {
        "invert": lambda: ledits.invert(PORTRAIT, num_steps=STEPS, skip=SKIP, callback=wait),
        "edit": lambda: ledits.edit(inversion, concepts=CONCEPTS, callback=wait),
        "invert_and_edit": lambda: ledits.invert_and_edit(
            PORTRAIT, num_steps=STEPS, skip=SKIP, concepts=CONCEPTS, callback=wait
        ),
        "generate": lambda: ledits.generate("portrait", num_steps=STEPS, callback=wait),
    }

    def run() -> None:
        try:
            runs[phase]()
        except (InputError, RuntimeError) as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)
    with pytest.raises(InputError, match="at work"):
        ledits.to("cpu", "float16")
    ledits.close()
    assert ledits.device.type == "cpu"
    with pytest.raises(InputError, match="closed"):
        ledits.invert(PORTRAIT)
    closed.set()
    thread.join(60)
    assert [type(end) for end in ends] == [Stopped]
    assert "stopped, since the LEdits was closed" in str(ends[0])
    assert ledits.device.type == "meta"


def test_a_callback_may_close_the_editor(inversion: Inversion) -> None:
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    with pytest.raises(Stopped, match="closed"):
        ledits.edit(inversion, concepts=CONCEPTS, callback=lambda progress: ledits.close())
    assert ledits.device.type == "meta"
    ledits.close()
    with pytest.raises(InputError, match="closed"):
        ledits.to("cpu")

"""float32 on a CUDA device is float32: the flags while a network is called, and behind it. No such device is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ledits_min import InputError, LEdits
from ledits_min.app.cli import main
from ledits_min.engine import precision, runner
from ledits_min.engine.precision import float32_products

SAMPLE = Path(__file__).parents[2] / "weights/tiny/samples/portrait1.png"
QUICK: dict[str, Any] = {"num_steps": 2, "skip": 0, "size": 64, "progress": False}
CUDA = torch.device("cuda")
matmul: Any = torch.backends.cuda.matmul
cudnn: Any = torch.backends.cudnn
newer = pytest.mark.skipif(not hasattr(cudnn, "conv"), reason="this torch has the older flags alone")


def older() -> tuple[bool, bool, str]:
    return matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()


def all_flags() -> list[object]:
    """Of both interfaces; what cannot be read is such a flag too."""
    found: list[object] = [flag.fp32_precision for flag in precision._newer_flags()]
    for read in (lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return found


@pytest.fixture(autouse=True)
def flags_as_they_were() -> Iterator[None]:
    """Whatever a test sets."""
    names = [("older", torch.get_float32_matmul_precision(), cudnn.allow_tf32)]
    values = [(flag, flag.fp32_precision) for flag in precision._newer_flags()]
    yield
    for _, products, convolutions in names:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
    for flag, value in values:
        flag.fp32_precision = value


BEFORE: dict[str, Callable[[], object]] = {
    "torch's default": lambda: None,
    "products round": lambda: setattr(matmul, "allow_tf32", True),
    "products round further": lambda: torch.set_float32_matmul_precision("medium"),
    "nothing rounds": lambda: setattr(cudnn, "allow_tf32", False),
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE.keys())
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_flags_are_set_and_put_back(before: Callable[[], object], tf32: bool, fails: bool) -> None:
    before()
    kept = all_flags()
    try:
        with float32_products(CUDA, tf32):
            assert older()[:2] == (tf32, tf32)
            with float32_products(CUDA, not tf32):  # a hook calls another network
                assert older()[:2] == (not tf32, not tf32)
            assert older()[:2] == (tf32, tf32)
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert all_flags() == kept


@newer
@pytest.mark.parametrize("matrices", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("maps", ["ieee", "tf32", "none"])
def test_flags_that_were_set_by_the_newer_interface(matrices: str, maps: str) -> None:
    matmul.fp32_precision, cudnn.conv.fp32_precision = matrices, maps
    kept = all_flags()
    for tf32 in (False, True):
        with float32_products(CUDA, tf32):
            assert matmul.fp32_precision == cudnn.conv.fp32_precision == ("tf32" if tf32 else "ieee")
        assert all_flags() == kept


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_are_left_alone(device: str) -> None:
    cudnn.allow_tf32 = True
    kept = all_flags()
    with float32_products(torch.device(device), tf32=False):
        assert all_flags() == kept


def test_threads_take_turns() -> None:
    """Each sees its own flags from the beginning of its call to the end."""
    kept, wrong, together = all_flags(), [], threading.Barrier(2)

    def work(tf32: bool) -> None:
        together.wait()
        for _ in range(200):
            with float32_products(CUDA, tf32):
                if older()[:2] != (tf32, tf32):
                    wrong.append(tf32)

    threads = [threading.Thread(target=work, args=(tf32,)) for tf32 in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all_flags() == kept


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("tf32", [False, True])
def test_every_network_of_an_edit_is_called_so(engine: str, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that passes for CUDA. Nothing is left behind, also where a call fails."""
    monkeypatch.setattr(runner, "float32_products", lambda device, tf32: float32_products(CUDA, tf32))
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32", engine=engine)
    ledits.runner.tf32 = tf32
    assert ledits.precision == ("tf32" if tf32 else "float32")
    seen: dict[str, set[bool]] = {}
    layers = {
        "UNet": ledits.unet.conv_out, "encoder": ledits.vae.encoder.conv_in, "decoder": ledits.vae.decoder.conv_in,
        "time": ledits.unet.time_embedding, "text": next(ledits.text.model.children()),  # type: ignore[union-attr]
    }  # fmt: skip
    for name, layer in layers.items():
        note = partial(lambda name, *_: seen.setdefault(name, set()).update(older()[:2]), name)
        layer.register_forward_pre_hook(note)
    kept = all_flags()
    ledits.invert_and_edit(SAMPLE, target="a hat", **QUICK)
    assert seen == {name: {tf32} for name in layers} and all_flags() == kept

    def fails(*_: object) -> None:
        raise ValueError("a hook's")

    for layer in layers.values():
        handle = layer.register_forward_pre_hook(fails)
        with pytest.raises(ValueError, match="a hook's"):
            ledits.invert_and_edit(SAMPLE, target="a hat", **QUICK)
        handle.remove()
        assert all_flags() == kept


def test_what_is_no_dtype_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="dtype 'tf32' is a CUDA device's, and this is cpu; use float32"):
        LEdits.from_pretrained("tiny", device="cpu", dtype="tf32")
    with pytest.raises(InputError, match="dtype 'int8' is not supported; the choices are auto, .*tf32"):
        LEdits.from_pretrained("tiny", device="cpu", dtype="int8")
    assert main(["edit", str(SAMPLE), "--add", "hat", "--device", "cpu", "--dtype", "tf32", "--explain"]) == 2
    assert "use float32" in capsys.readouterr().err

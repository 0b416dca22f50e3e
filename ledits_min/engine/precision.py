"""What float32 means to CUDA's libraries: all of it, or rounded to TF32 (10 bits) in front of products.

Torch keeps that in flags of the whole process, and by its default convolutions round and products of matrices do not.
So a network's every call sets them, and puts them back behind it. Threads take turns, or one would put back what another
has set; a turn lasts as long as a call is launched, not as long as the device works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any

import torch

_turn = RLock()  # a hook inside a call may call another network


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """For a while, products and convolutions of float32 on a CUDA device are full ones, or with `tf32` rounded ones."""
    if device.type != "cuda":
        yield
        return
    with _turn:
        put_back = _set(tf32)
        try:
            yield
        finally:
            for flag in put_back:
                flag()


def _set(tf32: bool) -> list[Callable[[], object]]:
    """Set the flags; what it returns puts them back, called in its order.

    Torch has an older and, from 2.9, a newer interface to the same flags, and refuses to read the older one where the
    two disagree. So both are set, unless somebody else has made them disagree: then the newer, which is what counts.
    """
    put_back: list[Callable[[], object]] = []
    try:
        put_back.append(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
        put_back.append(partial(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32))
    except RuntimeError:
        put_back.clear()
    newer = _newer_flags()
    older = bool(put_back)
    put_back += [partial(setattr, flag, "fp32_precision", flag.fp32_precision) for flag in newer]
    if older:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    for flag in newer[:2]:
        flag.fp32_precision = "tf32" if tf32 else "ieee"
    return put_back


def _newer_flags() -> list[Any]:
    """Those of products and of convolutions, then those that the older ones move as well."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    flags = [torch.backends.cuda.matmul, *(getattr(cudnn, name, None) for name in ("conv", "rnn"))]
    flags.append(getattr(mkldnn, "matmul", None))
    return [flag for flag in flags if hasattr(flag, "fp32_precision")]

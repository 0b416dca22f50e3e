"""The switch: who computes, and what is refused. What is computed is tested in tests/kernels/."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from ledits_min.engine import ops
from ledits_min.engine.ops import use_triton
from ledits_min.errors import InputError


@pytest.fixture
def cuda() -> torch.Tensor:
    """A tensor that says it is on a GPU, wherever the test runs."""

    class Device:
        type = "cuda"

    class Fake:
        device = Device()
        requires_grad = False

    return Fake()  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["", "Triton", "yes"])
def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("LEDITS_KERNELS", mode)
    with pytest.raises(InputError, match=f"LEDITS_KERNELS is '{mode}'.*'auto', 'torch' or 'triton'"):
        use_triton(torch.zeros(1))


def test_auto_takes_triton_on_cuda_only(monkeypatch: pytest.MonkeyPatch, cuda: torch.Tensor) -> None:
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    for mode, on_cpu, on_cuda in [(None, False, True), ("auto", False, True), ("torch", False, False)]:
        monkeypatch.delenv("LEDITS_KERNELS", raising=False)
        if mode is not None:
            monkeypatch.setenv("LEDITS_KERNELS", mode)
        assert use_triton(torch.zeros(1)) == on_cpu
        assert use_triton(cuda) == on_cuda


def test_only_an_absent_triton_falls_back(monkeypatch: pytest.MonkeyPatch, cuda: torch.Tensor) -> None:
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    monkeypatch.setenv("LEDITS_KERNELS", "auto")
    assert not use_triton(cuda)
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    with pytest.raises(InputError, match="no triton is installed"):
        use_triton(cuda)


def test_a_broken_triton_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "use_triton", lambda *tensors: True)
    monkeypatch.setitem(sys.modules, "ledits_min.kernels.geglu", None)  # importing it fails
    monkeypatch.delattr("ledits_min.kernels.geglu", raising=False)
    with pytest.raises(ImportError):
        ops.geglu(torch.zeros(2, 4))


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="the tensors are on 'cpu'"):
        use_triton(torch.zeros(1))


def test_autograd_keeps_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have no backward: training must not lose its gradients to them."""
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    leaf = torch.zeros(1, requires_grad=True)
    assert not use_triton(torch.zeros(1), leaf)
    with torch.no_grad():
        assert use_triton(torch.zeros(1), leaf)


def test_on_a_cpu_the_layers_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEDITS_KERNELS", raising=False)
    norm, hidden, time = nn.GroupNorm(4, 8), torch.randn(2, 8, 5, 3), torch.randn(2, 8)
    expected = nn.functional.silu(norm(hidden + time[:, :, None, None]))
    assert torch.equal(ops.group_norm_silu(hidden, norm, time), expected)
    assert torch.equal(ops.group_norm_silu(hidden, norm, silu=False), norm(hidden))
    value, gate = hidden.flatten(2).chunk(2, dim=1)
    projected = torch.cat([value, gate], dim=1).transpose(1, 2)
    assert torch.equal(ops.geglu(projected), (value * nn.functional.gelu(gate)).transpose(1, 2))

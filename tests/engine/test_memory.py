"""What is told of a machine's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ledits_min.engine import memory

CPU = torch.device("cpu")


def test_free_memory_is_what_could_be_had() -> None:
    total, free = memory.total_memory(CPU), memory.free_memory(CPU)
    assert 2**27 < free <= total
    held = torch.ones(2**26)  # 256 MiB, touched
    assert memory.free_memory(CPU) < free + 2**26
    del held


@pytest.mark.parametrize("content", ["", "MemTotal: 1 kB\n", None])
def test_where_linux_does_not_tell(content: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        if content is None:
            raise FileNotFoundError(path)
        return content

    monkeypatch.setattr(Path, "read_text", read_text)
    assert 0 < memory.free_memory(CPU) <= memory.total_memory(CPU)

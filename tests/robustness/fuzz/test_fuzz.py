"""The first inputs of the long run, every time the tests run; and properties that need no files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledits_min.app.cli.options import build_parser
from ledits_min.config import EditDefaults, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ledits_min.errors import InputError
from ledits_min.files.configs import read_config

ROOT = Path(__file__).resolve().parents[3]
COUNT = 2000
KINDS = {"headers", "pictures", "decoders", "batch folders", "inversions", "folders", "loras", "embeddings",
         "tokenizers", "configs", "bombs"}  # fmt: skip


def test_two_thousand_damaged_files_are_taken_or_refused() -> None:
    command = [sys.executable, "-m", "tests.robustness.fuzz", "--count", str(COUNT), "--seed", "1"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[:5000] + finished.stderr[-3000:]
    summary = json.loads(finished.stdout)
    assert summary["inputs"] == COUNT
    assert set(summary["outcomes"]) == KINDS
    for kind in KINDS - {"bombs"}:  # deep enough that some are still good, and damaging enough that most are not
        assert summary["outcomes"][kind]["accepted"] > 0
        assert summary["outcomes"][kind]["refused"] > 10


def test_a_number_always_makes_the_same_input() -> None:
    spec = importlib.util.spec_from_file_location("ledits_min_test_mutate", Path(__file__).with_name("mutate.py"))
    assert spec is not None and spec.loader is not None
    mutate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutate)
    value = {"a": [1, 2, {"b": "c"}], "d": None}
    damages: list[Callable[[Random], bytes]] = [
        lambda rng: mutate.json_text(rng, value),
        lambda rng: mutate.raw(rng, b"0123456789" * 9),
    ]
    for damage in damages:
        made = [[damage(Random(f"0:{number}")) for number in range(50)] for _ in range(2)]
        assert made[0] == made[1]
        assert len(set(made[0])) > 25


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@pytest.mark.parametrize("config", [UNetConfig, VAEConfig, TextConfig, ScheduleConfig, EditDefaults])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_config_of_any_values_is_read_or_refused(config: Any, data: st.DataObject) -> None:
    keys = [*config.__dataclass_fields__, "_class_name", "attention_head_dim", "model_type", "trained_betas"]
    mapping = data.draw(st.dictionaries(st.sampled_from(keys), JSON, max_size=5))
    try:
        read_config(config, mapping, "config.json")
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 4000


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=12) | st.sampled_from(["--add", "--size", "--steps", "-o", "a:scale=3", "x.png"])))
def test_any_words_on_the_command_line_are_parsed_or_refused(words: list[str]) -> None:
    try:
        build_parser().parse_args(["edit", *words])
    except InputError as error:
        assert str(error)
    except SystemExit as finished:  # --help
        assert finished.code == 0

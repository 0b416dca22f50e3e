"""RESULTS.md from small made-up results: the same text every time, and every figure judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dicebear", reason="the [train] extra is not installed")

ROOT = Path(__file__).resolve().parents[2]
Report = Callable[[Path, Path], str]
METHODS = ("LEDITS, workflow 1", "LEDITS, workflow 2", "DDPM inversion", "DDPM inversion + P2P")
GROUPS = ("addition", "removal, reversed", "removal, by phrase", "change")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    """bench/ can be imported from the root of the repository only."""
    monkeypatch.syspath_prepend(ROOT)
    found: Report = import_module("bench.report").report
    return found


def measured(success: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "success": success,
        "kept_ratio": 0.97,
        "closer": 0.95,
        "outside_db": 33.0,
        "gain_db": 4.0,
    }
    values |= {f"{name}_interval": [value - 0.01, value + 0.01] for name, value in values.items()}
    inside = {f"ideal_inside_{unit}_{when}": 0.5 for unit in ("db", "ssim") for when in ("before", "after")}
    return {**values, **inside, "outside_ssim": 0.99, "count": 4}


def rate(success: float) -> dict[str, Any]:
    return {"success": success, "interval": [success - 0.1, success]}


def monotone(rho: float | None) -> dict[str, Any]:
    mean: dict[str, Any] = {"mean": rho, "interval": [0.5, 1.0]}
    return {"rho": mean, "rho_rounded": mean, "rho_whole_sweep": mean, "strengths": [0, 1], "probability": [0.0, 1.0]}


def study(success: float = 0.99, rho: float | None = 0.95) -> dict[str, Any]:
    setting = {"num_steps": 50, "skip": 14, "scale": 6.0, "threshold": 0.9, "warmup_steps": 1}
    points = [
        {"method": method, "skip": skip, "scale": scale, **measured(success)}
        for method, skip, scale in zip(METHODS, (0.28, 0.28, 0.36, 0.12), (6.0, 6.0, 15.0, 9.0), strict=True)
    ]
    compared: dict[str, dict[str, Any]] = {
        method: {"success": 0.8, "gain_db": 3.0, "outside_db": 30.0 + i} for i, method in enumerate(METHODS)
    }
    compared[METHODS[1]] = {"success": None, "gain_db": None, "outside_db": 20.0}
    curve = {"setting_scale": 6.0, "points": points, "compared": compared, "monotone": monotone(rho)}
    both = {"alone": {"a": rate(1.0)}, "beside_the_other": {"a": rate(0.9)}, "both": measured(0.9)}
    seeds = {"seeds": 2, "portraits": 2, "edits_differ_levels": 9.0, "reconstructions_differ_levels": 0.1}
    return {
        "command": "python bench/study/__main__.py",
        "conditions": {
            "counts": {"portraits": 4, "captions": 2, "each": 2},
            "settings": {"local": setting},
            "versions": {"torch": "2"},
            "processor": "a processor",
            "threads": 1,
            "dtype": "float32",
        },
        "work": {"edits": {"unet_evaluations": 1000, "seconds": 60.0}},
        "model": {
            "factor": 8,
            "vae_psnr_db": 31.0,
            "oracle_accuracy": {"hat": 0.99},
            "generation_accuracy": {"all": 0.96, "hat": 0.9, "skin": None},
        },
        "edits": {
            f"edit {g}": {"group": g, "reach": "local", "vague": g == GROUPS[1], **measured(success)} for g in GROUPS
        },
        "curves": {"edit": curve},
        "reverse": {"- edit": monotone(0.92)},
        "sega": {"edit": {**rate(0.9), "count": 3, "kept": 0.9, "psnr_db": {"mean": 25.0}}},
        "target": {"a under b": {"without": rate(1.0), "with": rate(0.9)}},
        "pairs": {"a b": {**both, "to_product": 0.95, "to_product_interval": [0.9, 1.0]}},
        "sweeps": {
            "edit by skip": {"rows": [{"value": 0.2, "outside_db": 30.0, "success": 1.0}], "rho": {"mean": None}}
        },
        "cost": {"LEDITS": {"evaluations": 10, "seconds": 0.5}},
        "seeds": {"edit": {**seeds, "worst_reconstruction_db": 55.0, "worst_latent_error": 1e-5}},
        "elsewhere": {"a style": {"vae_psnr_db": 22.0, "edit": {"seen_before": 0.0, **rate(0.5), "psnr_db": 25.0}}},
    }


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value))
    return folder


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


def test_the_same_results_give_the_same_text(report: Report, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "results", study=study(), edit={"edit_sample": {"seconds": {"min": 5, "median": 6, "max": 7}}}
    )
    text = report(folder, tmp_path)
    assert text == report(folder, tmp_path)
    assert "None" not in text and "nan" not in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings)) >= 6
    widths = {}
    for number, line in enumerate(text.splitlines()):
        if line.startswith("|"):
            widths[number] = line.count("|")
            assert widths.get(number - 1, widths[number]) == widths[number]  # a table keeps its columns


@pytest.mark.parametrize(("success", "verdict"), [(0.99, "met"), (0.5, "**missed**")])
def test_every_figure_is_judged(report: Report, tmp_path: Path, success: float, verdict: str) -> None:
    text = report(write(tmp_path / "results", study=study(success)), tmp_path)
    assert line_of(text, "success of additions").endswith(f"| {verdict} |")
    assert line_of(text, "VAE").endswith("| met |")


def test_the_sample_edit_must_stay_below_its_limit(report: Report, tmp_path: Path) -> None:
    for seconds, verdict in ((14.9, "met"), (15.1, "**missed**")):
        sample = {"edit_sample": {"seconds": {"min": 1, "median": seconds, "max": 20}}}
        text = report(write(tmp_path / "results", study=study(), edit=sample), tmp_path)
        assert line_of(text, "README's sample edit").endswith(f"| {verdict} |")


def test_it_says_where_ledits_loses(report: Report, tmp_path: Path) -> None:
    text = report(write(tmp_path / "results", study=study()), tmp_path)
    assert "Workflow 1 loses nowhere." in text
    assert "Workflow 1 loses on edit (to DDPM inversion + P2P)." in text


def test_a_dash_where_the_ideal_is_a_matter_of_taste(report: Report, tmp_path: Path) -> None:
    text = report(write(tmp_path / "results", study=study()), tmp_path)
    assert " - | - |" in line_of(text, "edit removal, reversed")
    assert " - | - |" not in line_of(text, "edit addition")


def test_other_files_are_shown_by_their_shape(report: Report, tmp_path: Path) -> None:
    bench = {"op[case]": {"seconds": {"min": 1.0, "median": 2.0, "max": 3.0}, "rounds": 3, "peak_MiB": 7}}
    tune = {"command": "python bench/study/tune.py", "note": "more steps:", "rows": [{"skip": 14, "success": 0.9}]}
    text = report(write(tmp_path / "results", op=bench, tune_more=tune, odd={"x": 1}), tmp_path)
    assert "## op.json" in text and "peak_MiB 7" in text
    assert "more steps: `python bench/study/tune.py`" in text and "| 14 | 0.9 |" in text
    assert "Not shown above: odd.json." in text


SIZES = {  # of the edits of which a ratio was wanted
    "cpu": {"size": 512, "steps": 20, "skip": 7, "concepts": 2, "images": 1},
    "cuda": {"size": 512, "steps": 100, "skip": 36, "concepts": 2, "images": 1},
}


@pytest.mark.parametrize(("name", "more", "wanted"), [
    ("cpu", {}, "2"), ("cpu", {"prompts": True}, "1.6"), ("cpu", {"peer_dtype": "fp32"}, "5"),
    ("cpu", {"compile": True}, "-"), ("cpu", {"dtype": "fp32"}, "-"),
    ("cpu", {"size": 256}, "-"), ("cpu", {"steps": 10}, "-"), ("cpu", {"skip": 0}, "-"), ("cpu", {"concepts": 1}, "-"),
    ("cuda", {"dtype": "fp16"}, "4"), ("cuda", {"dtype": "fp16", "compile": True}, "2.5"),
    ("cuda", {"dtype": "fp16", "images": 8}, "-"), ("cuda", {"dtype": "fp16", "prompts": True}, "-"),
])  # fmt: skip
def test_what_was_wanted_stands_beside_what_was_reached(
    name: str, more: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    settings = {"dtype": "bf16", "peer_dtype": "bf16", "prompts": False, "compile": False, **SIZES[name], **more}
    assert import_module("bench.report_speed").wanted_ratio(f"{name} 512 px", settings) == wanted


def test_speed_is_shown_with_where_it_was_measured(report: Report, tmp_path: Path) -> None:
    side = {"evaluations": 48, "seconds": {"edit": 20.0, "decode": 1.5}, "peak_memory_GB": 3.5, "flop_utilisation": 0.4}
    edit = {"peer_dtype": "bf16", "prompts": False, "compile": False, **SIZES["cpu"]}
    peer = {
        f"cpu {dtype}": {
            "settings": {**edit, "dtype": dtype},
            "ours": {**side, **more},
            "peer": side,
            "ratio": 1.0,
            "conditions": {"cores": cores},
        }
        for dtype, more, cores in (("bf16", {}, 2), ("fp32", {"second_edit_seconds": 15.2}, 4))
    }
    alone = {"cpu": {"batch 4": {"ours": {"seconds": 2.0, "to_ours": 1.0}}, "conditions": {"cores": 2}}}
    point = {"value": 5, "seconds": 1.25, "evaluations": 9, "peak_GB": 2.0}
    both = {name: {"steps": [point]} for name in ("ours", "peer")}
    growth = {"base": {"steps": 10}, "dtype": "fp32", "device": "cpu", **both, "conditions": {"cores": 3}}
    text = report(write(tmp_path / "results", peer=peer, unet_alone=alone, growth=growth), tmp_path)
    assert "(a) cores: 2" in text and "(b) cores: 4" in text
    assert line_of(text, "cpu bf16") == "| cpu bf16 | 21.5 | 21.5 | 1 | 2 | - | 48 | 48 | 3.5 | 3.5 | 40% | a |"
    assert " | - | 15.2 | " in line_of(text, "cpu fp32") and line_of(text, "cpu fp32").endswith("| b |")
    assert line_of(text, "cpu | batch 4") == "| cpu | batch 4 | ours 2 (1) | a |"
    assert "fp32, cpu, steps 10; cores: 3" in text and "(results/growth.png)" in text
    assert line_of(text, "steps") == "| steps | 5 | 1.2 | 1.2 | 9 | 9 | 2 | 2 |"
    assert "Not shown above" not in text

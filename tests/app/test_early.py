"""What is refused before anything heavy is imported: a missing file, a bad option, a word nobody knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ledits_min.app.cli import WAITING, main
from ledits_min.app.words import check_words
from ledits_min.errors import InputError
from ledits_min.pipeline import LEdits
from ledits_min.weights.read.survey import TINY

SAMPLE = TINY / "samples" / "portrait1.png"

# One process for all of them; each line says the exit code and the heavy packages that are there by now.
SCRIPT = """
import io, json, sys
from contextlib import redirect_stderr
from ledits_min.app.cli import WAITING, main
for argv in json.loads(sys.argv[1]):
    said = io.StringIO()
    with redirect_stderr(said):
        code = main(argv)
    heavy = [name for name in ("torch", "transformers", "safetensors", "ray", "gradio") if name in sys.modules]
    print(json.dumps([code, said.getvalue(), heavy]))
"""

REFUSALS: list[tuple[list[str], str]] = [
    (["edit", "none.png"], "'none.png' does not exist"),
    (["edit", "p.png", "--model", "none.safetensors"], "'none.safetensors' is neither a file nor a folder here"),
    (["edit", "p.png", "--lora", "none.safetensors"], "none.safetensors"),
    (["edit", "p.png", "--steps", "0"], "--steps is 0"),
    (["edit", "p.png", "--device", "potato"], "'potato' is none of auto, cpu"),
    (["edit", "p.png", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["edit", "p.png", "--add", "hat:scale=1e4"], "--add 'hat': scale is 10000.0"),
    (["edit", "p.png", "--p2p", "cross=2", "--source", "hat", "--target", "beard"], "--p2p cross is 2.0"),
    (["edit", "p.png", "--p2p", "--target", "beard"], "pass --source"),
    (["edit", "p.png", "--add", "zeppelin"], "does not know 'zeppelin'; it knows: a, an, "),
    (["edit", "p.png", "--target", "a sungglasses"], "'sungglasses' (did you mean sunglasses?); it knows"),
    (["edit", "p.png", "-o", "no/o.png"], "does not exist; make it first"),
    (["edit", "p.png", "-o", "p.png", "--overwrite"], "is an input of this run"),
    (["edit", "p.png", "--masks", "m.png"], "--masks shows where concepts acted"),
    (["edit", "i.safetensors", "--seed", "3"], "--seed has no effect on a saved inversion"),
    (["invert", "p.png", "-o", "i.safetensors", "--source", "zeppelin", "--overwrite"], "zeppelin"),
    (["sweep", "p.png", "--add", "zeppelin", "--scale", "1,2"], "does not know 'zeppelin'"),
    (["sweep", "p.png", "--add", "hat"], "nothing is swept"),
    (["batch", "none.csv", "-o", "out"], "'none.csv' does not exist"),
    (["batch", "t.csv", "-o", "p.png"], "it is not a folder"),
    (["batch", "t.csv", "-o", "out", "--add", "zeppelin"], "does not know 'zeppelin'"),
    (["demo", "none.png"], "'none.png' does not exist"),
    (["inspect", "none"], "'none' is neither a file nor a folder here"),
    (["inspect", "README.md"], "'README.md' is a text file"),
]


def test_nothing_heavy_is_imported_for_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(SAMPLE.read_bytes())
    (tmp_path / "t.csv").write_text("image\np.png\n")
    (tmp_path / "README.md").write_text("# A title\n\nSome text.\n")
    (tmp_path / "i.safetensors").write_bytes((TINY / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    command = [sys.executable, "-c", SCRIPT, json.dumps([argv for argv, _ in REFUSALS])]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for (argv, says), line in zip(REFUSALS, finished.stdout.splitlines(), strict=True):
        code, said, heavy = json.loads(line)
        assert (code, heavy) == (2, []), (argv, said)
        assert said.startswith("ledits: error: ") and says in said and said.count("\n") == 1, (argv, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prompt", ["zeppelin", "a sungglasses and a zeppelin", "hat, (beard:1.3)", "Größe"])
def test_a_word_is_refused_early_in_the_words_of_the_model(prompt: str) -> None:
    with pytest.raises(InputError) as early:
        check_words(TINY / "tokenizer", ["a hat", prompt])
    with pytest.raises(InputError) as late:
        LEdits.from_pretrained(device="cpu", dtype="float32").text.check(prompt)
    assert str(early.value) == str(late.value)


def test_known_words_and_other_tokenizers_pass(tmp_path: Path) -> None:
    check_words(TINY / "tokenizer", ["a hat", "", "A MAN, with glasses"])
    check_words(None, ["zeppelin"])
    for content in ("", "{}", "[]", '{"model": {"type": "BPE"}}', '{"model": {"type": "WordLevel"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        check_words(tmp_path, ["zeppelin"])


def test_a_home_folder_is_found_in_any_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["inspect", "~/none.safetensors"]) == 2
    assert main(["edit", str(SAMPLE), "--model=~/none.safetensors"]) == 2
    assert main(["edit", str(SAMPLE), "--lora=~/none.safetensors:0.5"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(f"'{tmp_path}/none.safetensors'" in line for line in lines), lines


@pytest.mark.parametrize("command", ["edit", "sweep", "batch", "invert", "demo", "web", "inspect"])
@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_help_keeps_together_what_belongs_together(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    for line in text.splitlines():
        assert not line.rstrip().endswith((" ..", "default:", " --"))
    assert f"\n  ledits {command}" in text[text.index("\nexamples:") :]


def test_python_m_ledits_min_is_the_command(tmp_path: Path) -> None:
    """With its help and its exit codes."""
    command = [sys.executable, "-m", "ledits_min"]
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("usage: ledits [")
    refused = subprocess.run([*command, "edit", "none.png"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith("ledits: error: 'none.png' does not exist") and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("own", [None, *WAITING])
def test_threads_sleep_while_they_wait_unless_the_user_said_how(own: str | None) -> None:
    """OpenMP reads its environment when torch loads it, and says on request what it has read."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    environment |= {} if own is None else {own: "active" if own == WAITING[0] else "7"}
    script = "import sys; from ledits_min.app.cli import main; sys.argv = ['ledits', '--version']; main(); import torch"
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ("GOMP_SPINCOUNT = '0'" in ran.stderr) == (own is None)


def test_the_library_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    assert main(["--version"]) == 0
    assert not any(name in os.environ for name in WAITING)

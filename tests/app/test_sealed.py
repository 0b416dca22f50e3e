"""Whole edits with everything forbidden that a checkpoint must never cause: a network, a process, code, a pickle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SAMPLE = Path(__file__).resolve().parents[2] / "weights/tiny/samples/portrait1.png"

# Python tells of each of these before it happens, whichever library asks. A caught refusal still counts: it is noted.
SEALED = """
import json, os, sys
FORBIDDEN = ("socket.", "urllib.Request", "http.client.connect", "ftplib.connect", "subprocess.Popen", "os.system",
             "os.exec", "os.fork", "os.posix_spawn", "pickle.find_class", "webbrowser.open")
checkpoint = os.path.realpath(sys.argv[1])
import torch, transformers  # what they do while they are imported, no checkpoint has a say in
from ledits_min.app.cli import main
seen = []

def watch(event, arguments):
    runs = event in ("exec", "compile", "import") and any(checkpoint in str(item) for item in arguments)
    pickled = event == "open" and str(arguments[0]).endswith((".bin", ".ckpt", ".pt", ".pkl", ".py"))
    if event.startswith(FORBIDDEN) or runs or (pickled and str(arguments[0]).startswith(checkpoint)):
        seen.append((event, str(arguments)[:200]))
        raise PermissionError(event)

sys.addaudithook(watch)

def provoked():
    import socket
    for forbidden in (lambda: socket.create_connection(("127.0.0.1", 9)),
                      lambda: compile("1", os.path.join(checkpoint, "pipeline.py"), "exec")):
        try:
            forbidden()
        except PermissionError:
            pass
    return [event for event, _ in seen]

codes = [main(argv) for argv in json.loads(sys.argv[2])]
print(json.dumps({"codes": codes, "seen": list(seen), "provoked": provoked()}))
"""


def sealed(place: Path, *commands: list[str]) -> tuple[dict[str, Any], str]:
    """The commands in one process in `place`, where all checkpoints lie; what it saw, and what it said."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    command = [sys.executable, "-c", SEALED, str(place), json.dumps(commands)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stderr


def booby_trapped(checkpoints: ModuleType, folder: Path, family: str) -> None:
    """A sound folder with all that other programs would import, unpickle or fetch from it."""
    checkpoints.write_family_folder(folder, family)
    trap = "raise SystemExit('imported')\n"
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("pipeline.py", "modeling.py", "tokenization.py", "__init__.py", "conftest.py", "torch.py"):
            (place / name).write_text(trap)
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt"):
            (place / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline", "Evil"], "_name_or_path": "https://example.org/evil"}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("unet", "vae", "text_encoder"):
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | {"_name_or_path": "evil/model"}))


def test_edits_and_looks_touch_nothing(checkpoints: ModuleType, tmp_path: Path) -> None:
    shutil.copy(SAMPLE, tmp_path / "p.png")
    shutil.copytree(SAMPLE.parents[1], tmp_path / "tiny model")
    for family in checkpoints.REDUCED:
        booby_trapped(checkpoints, tmp_path / family, family)
    models = ["tiny model", *checkpoints.REDUCED]
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    quick = ["--add", "hat", "--steps", "3", "--skip", "1", "-o"]
    edits = [["edit", "p.png", "--model", model, *quick, f"{model}.png"] for model in models]
    found, said = sealed(tmp_path, *edits, *(["inspect", model] for model in models))
    assert found["codes"] == [0] * 8 and found["seen"] == [], said
    made = {str(tmp_path / f"{model}.png") for model in models}
    assert sorted(str(path) for path in tmp_path.rglob("*")) == sorted({*before, *made})
    assert len(found["provoked"]) == 2, "a watch that sees nothing proves nothing"


def test_what_is_not_there_is_not_fetched(tmp_path: Path) -> None:
    shutil.copy(SAMPLE, tmp_path / "p.png")
    commands = [["edit", "p.png", "--model", "org/name"], ["inspect", "org/name"], ["edit", "p.png", "--vae", "a/b"]]
    found, said = sealed(tmp_path, *commands)
    assert found["codes"] == [2, 2, 2] and found["seen"] == [], said
    assert said.count("hf download") == 3 and len(said.splitlines()) == 3

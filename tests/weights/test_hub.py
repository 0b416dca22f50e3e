"""A Hugging Face id is found in a cache laid out as the hub's library lays it out, and never anywhere else."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache
from hypothesis import given
from hypothesis import strategies as st

from ledits_min.errors import InputError
from ledits_min.weights.inspect import inspect
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.read.hub import is_hub_id

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an empty current folder."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def add(cache: Path, model: Path, name: str = "org/name", commit: str = FIRST, ref: str | None = "main") -> Path:
    """A folder as a snapshot: every file a relative link to a blob, the way the library stores it."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for file in (path for path in model.rglob("*") if path.is_file()):
        link = folder / "snapshots" / commit / file.relative_to(model)
        blob = folder / "blobs" / f"{commit[0]}{abs(hash(file)):x}"
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref is not None:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


def test_a_cached_model_loads(cache: Path, pristine: Path) -> None:
    snapshot = add(cache, pristine)
    found = try_to_load_from_cache("org/name", "unet/config.json", cache_dir=cache)
    assert found == str(snapshot / "unet/config.json")  # the library finds it there too
    checkpoint = load_checkpoint("org/name")
    assert checkpoint.fingerprint == load_checkpoint(pristine).fingerprint
    assert inspect("org/name").verdict == "loads"


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", SECOND])
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    cache: Path, pristine: Path, checkpoints: ModuleType, tmp_path: Path, revision: str
) -> None:
    add(cache, pristine)
    checkpoints.write_folder(tmp_path / "other", seed=1)
    add(cache, tmp_path / "other", commit=SECOND, ref=None if revision == SECOND else revision)
    main, other = load_checkpoint("org/name"), load_checkpoint(f"org/name@{revision}")
    assert main.fingerprint != other.fingerprint == load_checkpoint(tmp_path / "other").fingerprint
    with pytest.raises(InputError, match="--revision v3 "):
        load_checkpoint("org/name@v3")


def test_a_local_path_of_the_same_name_wins(cache: Path, pristine: Path, checkpoints: ModuleType) -> None:
    add(cache, pristine)
    checkpoints.write_folder(Path("org/name"), seed=1)
    assert load_checkpoint("org/name").fingerprint == load_checkpoint(Path("org/name")).fingerprint
    shutil.rmtree("org")
    assert load_checkpoint("org/name").fingerprint == load_checkpoint(pristine).fingerprint
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load_checkpoint(Path("org/name"))  # a Path is never an id


def command_in(error: pytest.ExceptionInfo[InputError]) -> list[str]:
    return shlex.split(str(error.value).rpartition("run: ")[2])


def test_what_is_not_there_is_one_command_away(cache: Path, pristine: Path, tmp_path: Path) -> None:
    """The command names every file that a load reads, and none of the other files of a repository."""
    with pytest.raises(InputError, match="nothing is ever downloaded") as caught:
        load_checkpoint("org/name@v2")
    command = command_in(caught)
    assert command[:5] == ["hf", "download", "org/name", "--revision", "v2"]
    assert set(command[5::2]) == {"--include"}
    patterns = command[6::2]
    repository = tmp_path / "repository"
    shutil.copytree(pristine, repository)
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "v1-5.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (repository / name).write_bytes(b"much")
    wanted = {path for pattern in patterns for path in repository.glob(pattern)}
    assert wanted == set(pristine_files(repository))
    for path in set(pristine_files(repository, everything=True)) - wanted:
        path.unlink()
    add(cache, repository, ref="v2")
    assert load_checkpoint("org/name@v2").fingerprint == load_checkpoint(pristine).fingerprint


def pristine_files(folder: Path, everything: bool = False) -> list[Path]:
    odd = (".bin", ".fp16.safetensors", "v1-5.safetensors")
    return [path for path in folder.rglob("*") if path.is_file() and (everything or not path.name.endswith(odd))]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("how", ["no folder", "no file", "dangling link", "a pickle alone"])
def test_half_a_download_is_told(cache: Path, pristine: Path, part: str, how: str) -> None:
    snapshot = add(cache, pristine)
    (weights,) = (snapshot / part).glob("*.safetensors")
    if how == "dangling link":
        weights.resolve().unlink()
    elif how == "no folder":
        shutil.rmtree(snapshot / part)
    else:
        weights.unlink()
    if how == "a pickle alone":
        weights.with_suffix(".bin").write_bytes(b"\x80\x02")
    with pytest.raises(
        InputError, match=f"without the {part.removesuffix('_encoder')} as .safetensors; run: hf"
    ) as caught:
        load_checkpoint("org/name")
    assert f"{part}*/{weights.name}" in command_in(caught) or f"{part}/{weights.name}" in command_in(caught)


def test_parts_that_are_passed_need_not_be_cached(cache: Path, pristine: Path) -> None:
    snapshot = add(cache, pristine)
    shutil.rmtree(snapshot / "vae")
    checkpoint = load_checkpoint("org/name", vae=pristine)
    assert checkpoint.fingerprint == load_checkpoint(pristine).fingerprint
    with pytest.raises(InputError) as caught:
        load_checkpoint("org/other", vae=pristine)
    assert not any(word.startswith("vae/") for word in command_in(caught))


def test_a_part_may_be_an_id_too(cache: Path, pristine: Path) -> None:
    add(cache, pristine / "vae", "org/vae")
    add(cache, pristine, "org/whole")
    for name in ("org/vae", "org/whole"):
        assert torch.equal(
            load_checkpoint(pristine, vae=name).vae["quant_conv.weight"],
            load_checkpoint(pristine).vae["quant_conv.weight"],
        )
    with pytest.raises(InputError) as caught:
        load_checkpoint(pristine, vae="org/absent")
    assert command_in(caught)[:3] == ["hf", "download", "org/absent"]


@pytest.mark.parametrize(
    "model",
    [
        "org/name/file.safetensors",
        "../name",
        "org/..",
        "org/name@../../x",
        "org/name@/etc",
        "a b/c",
        "org/",
        "/org",
        "x",
    ],
)
def test_what_is_no_id(cache: Path, model: str) -> None:
    assert not is_hub_id(model)
    with pytest.raises(InputError):
        load_checkpoint(model)


@given(st.text(max_size=40))
def test_no_text_leaves_the_cache(text: str) -> None:
    """An id is joined to the cache's path; it can hold no way out of it."""
    for model in (text, f"org/{text}", f"org/name@{text}"):
        assert not (is_hub_id(model) and (".." in model or "@/" in model or "\x00" in model or model.startswith("/")))


def test_the_cache_is_where_the_environment_says(pristine: Path, tmp_path: Path) -> None:
    """HF_HUB_CACHE, HF_HOME and the default, each in a process of its own; sockets are closed to it."""
    code = (
        "import socket, sys; socket.socket.connect = socket.getaddrinfo = None; "
        "from ledits_min.weights.inspect import inspect; print(inspect('org/name').verdict); "
        "assert 'torch' not in sys.modules"
    )
    for name, value, hub in (
        ("HF_HUB_CACHE", tmp_path / "a", tmp_path / "a"),
        ("HF_HOME", tmp_path / "b", tmp_path / "b/hub"),
        ("HOME", tmp_path / "c", tmp_path / "c/.cache/huggingface/hub"),
    ):
        add(hub, pristine)
        environment = {
            key: text for key, text in os.environ.items() if not key.startswith(("HF_", "XDG_", "HUGGINGFACE"))
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {name: str(value)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "loads\n", done.stderr

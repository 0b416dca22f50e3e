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

MATHS = {"config", "schedule", "inversion", "sega", "guidance", "edit"}
RUNNING = {"cost", "plan", "memory", "tiling", "engine", "denoiser", "preparing", "graphs", "runner", "beside"}
PARTS = MATHS | RUNNING | {"cpu", "ops", "unet", "vae", "text", "image", "archive", "record", "progress", "p2p"}

# Module of ledits_min -> the modules of ledits_min it may import. "" is the package itself (LEdits, __version__...),
# "weights.*" every file there. A module that is not in this table has no place in the house yet: give it one.
TABLE: dict[str, set[str]] = {
    "": {"config", "sega", "archive", "p2p", "pipeline", "progress"},
    "checks": set(),
    "config": {"checks"},
    "families": {"config"},
    "schedule": {"config"},
    # The maths takes eps_model and never sees a network.
    "inversion": {"config", "schedule"},
    "sega": {"config", "schedule"},
    "guidance": {"config", "schedule", "sega"},
    "edit": MATHS - {"edit"},
    "record": MATHS,
    "progress": {"config"},
    "request": {"config", "schedule", "sega"},
    "p2p": MATHS,
    "ops": {"config", "schedule", "inversion", "sega", "guidance", "cpu", "kernels.*"},
    "cpu": {"winograd"},
    "winograd": set(),
    # The same loops made fast: first what will be evaluated, then how.
    "cost": {"config", "winograd"},
    "plan": {"config", "cost", "guidance", "sega"},
    "memory": set(),
    "tiling": set(),
    "engine": MATHS | {"ops", "plan", "memory", "tiling", "vae"},
    "denoiser": {"schedule", "inversion", "p2p", "text", "unet"},
    "preparing": set(),
    "graphs": {"config", "memory", "preparing"},
    "runner": MATHS
    | RUNNING - {"runner", "beside"}
    | {"cpu", "ops", "record", "request", "progress", "text", "unet", "vae"},
    "beside": {
        "config",
        "denoiser",
        "edit",
        "ops",
        "p2p",
        "progress",
        "record",
        "request",
        "runner",
        "schedule",
        "text",
    },
    "unet": {"config", "ops"},
    "vae": {"config", "ops"},
    "text": {"config", "weights.clip_bpe", "weights.header"},
    # weights.header is a leaf of the standard library: how names are quoted, how a .safetensors header is checked.
    "image": {"config", "weights.header"},
    "archive": {"config", "image", "weights.header"},
    "networks": {"config", "cpu", "memory", "text", "unet", "vae", "weights.load"},
    "prepare": {"archive", "config", "image", "runner", "text", "unet"},
    # The only file that knows all parts.
    "pipeline": {""} | PARTS | {"networks", "prepare", "request", "weights.load", "weights.lora"},
    "app": set(),
    "app.*": {"", "app", "app.*", "pipeline", "networks"}
    | {"weights.load", "weights.inspect", "weights.survey", "weights.header"}
    | PARTS,
    "kernels.*": {"kernels.*"},
    "weights.train_tiny.*": {"", "pipeline", "weights.*", "weights.train_tiny.*"} | PARTS,
    "weights.header": {"config"},
    "weights.*": {"config", "families", "weights.*"},
}

# Top-level packages that may be imported in some places only.
RESERVED = {
    "diffusers": ("tests/oracle/", "bench/"),
    "triton": ("kernels/", "tests/kernels/", "bench/"),
    "dicebear": ("weights/train_tiny/", "tests/", "bench/"),
    "gradio": ("ledits_min/app/web",),
    "playwright": ("tests/app/test_web.py", "bench/web.py"),
    "resvg_py": ("weights/train_tiny/", "tests/", "bench/"),
    "pickle": (),
    "ray": ("ledits_min/app/batch/ray_engine.py",),
}
# What a distribution is imported as, where the names differ; tokenizers and huggingface_hub come with transformers.
IMPORT_NAMES = {
    "dicebear-core": {"dicebear"},
    "dicebear-styles": {"dicebear_styles"},
    "pillow": {"PIL"},
    "scikit-image": {"skimage"},
    "transformers": {"transformers", "tokenizers", "huggingface_hub"},
}

# Files of the package that only run with an extra.
WITH_EXTRA = {
    "weights/train_tiny/": "train",
    "ledits_min/app/web/": "web",
    "ledits_min/app/batch/ray_engine.py": "batch",
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
    """The row of TABLE for a module: its own, else its folder's."""
    return name if name in TABLE else folder_of(name) or name


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
    assert row_of("app.cli") == "app.*"
    assert row_of("weights.load") == "weights.*"
    assert row_of("utils") not in TABLE
    assert allows("app.*", "pipeline")
    assert not allows("pipeline", "app.cli")
    assert allows("weights.*", "weights.header")
    assert not allows("weights.header", "weights.load")
    assert not allows("weights.*", "weights.train_tiny.vae")
    assert "ledits_min.sega" in [name for _, name in imports("ledits_min/edit.py")]


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

    tests/fuzz is a program of its own, three files that import each other; bench/ holds programs (`python -m bench.x`)
    that share parts.
    """
    wrong = [
        f"{file}:{line} imports {name}"
        for file in of("ledits_min", "kernels", "weights", "bench", "tests")
        for line, name in imports(file)
        if name.split(".")[0] in ("tests", "bench", "conftest")
        if not (file.startswith("tests/fuzz/") and name.startswith("tests.robustness.fuzz"))
        if not (file.startswith("bench/") and not file.startswith("bench/test_") and name.startswith("bench."))
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
        (("tests/",), ("test", "train")),
        (("bench/",), ("bench",)),
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

"""What people get when they install it: the wheel's list, an edit from an empty environment, other people's names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "weights/tiny/samples/portrait1.png"

# sys.modules[name] = None makes `import name` fail as if it were not installed.
WITHOUT = "import sys; sys.modules[{name!r}] = None"


def run(*command: str | Path, cwd: Path) -> str:
    """A command in a clean environment; what it printed on stdout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, cwd: Path, options: Sequence[str] = ()) -> str:
    return run(sys.executable, *options, "-c", code, cwd=cwd)


def build(kind: str, tree: Path, out: Path) -> Path:
    """setuptools' own build hook, as pip and build call it: nothing is downloaded."""
    out.mkdir()
    python(f"from setuptools.build_meta import build_{kind} as build; build({str(out)!r})", cwd=tree)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is committed, because building writes beside the sources."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "ledits_min", "kernels", "weights", "tests", "bench"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*_cache", "*.egg-info")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build("wheel", tree, tree.parent / "wheel")


def names(wheel: Path) -> list[str]:
    return sorted(zipfile.ZipFile(wheel).namelist())


def sources(folder: str, pattern: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern) if path.is_file()]


def test_the_wheel_holds_all_of_us_and_nothing_else(wheel: Path) -> None:
    ours = [name for name in names(wheel) if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in ours} == {"ledits_min"}  # neither kernels, weights, tests nor bench
    wanted = {"ledits_min/py.typed", "ledits_min/weights/bpe_simple_vocab_16e6.txt.gz"}
    kinds = ("**/*.py", "app/web/*.css", "app/comfyui/*.json")
    wanted |= {path for kind in kinds for path in sources("ledits_min", kind)}
    wanted |= {f"ledits_min/{name}" for name in sources("kernels", "*.py") + sources("kernels", "*.json")}
    wanted |= {f"ledits_min/{name}" for name in sources("weights", "**/*.py") + sources("weights/tiny", "**/*")}
    assert set(ours) == wanted
    assert len(ours) == len(set(ours))


def test_the_wheel_carries_every_licence(wheel: Path) -> None:
    licences = [name for name in names(wheel) if ".dist-info/licenses/" in name]
    assert sorted(Path(name).name for name in licences) == ["CLIP_LICENSE", "LICENSE"]
    assert "ledits_min/weights/tiny/NOTICE.md" in names(wheel)


def test_the_sdist_makes_the_same_wheel(tree: Path, wheel: Path) -> None:
    with tarfile.open(build("sdist", tree, tree.parent / "sdist")) as archive:
        archive.extractall(tree.parent / "unpacked", filter="data")
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    assert names(build("wheel", unpacked, tree.parent / "again")) == names(wheel)


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The bin folder of a new virtual environment with the wheel and our dependencies, but without diffusers.

    The dependencies are those of the running interpreter, seen through a .pth file: an editable install of this tree
    has its own .pth file there, and those of a folder that came in through a .pth file are not read.
    """
    home = wheel.parent.parent / "venv"
    venv.create(home, symlinks=True)
    interpreter = home / "bin/python"
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    site = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "outer.pth").write_text("\n".join([*here, WITHOUT.format(name="diffusers")]))
    command = ("pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", *command, cwd=home)
    return interpreter.parent


def test_the_wheel_edits_a_picture_elsewhere(installed: Path, tmp_path: Path) -> None:
    """The first thing README promises, from an empty folder, with the installed command."""
    shutil.copy(SAMPLE, tmp_path / "portrait.png")
    home = run(installed / "python", "-c", "import ledits_min; print(ledits_min.__file__)", cwd=tmp_path).strip()
    assert Path(home).is_relative_to(installed.parent)
    options = ("--add", "sunglasses", "--steps", "4", "--skip", "1", "-o", "out.png")
    run(installed / "ledits", "edit", "portrait.png", *options, cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "portrait.png"]
    assert Image.open(tmp_path / "out.png").size == Image.open(SAMPLE).size


def test_diffusers_was_really_out_of_reach(installed: Path, tmp_path: Path) -> None:
    probe = "import importlib.util as u; print(u.find_spec('diffusers'), u.find_spec('transformers') is not None)"
    assert run(installed / "python", "-c", probe, cwd=tmp_path).split() == ["None", "True"]


WHOSE_KERNELS = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print([] if spec is None else [str(spec.origin), *map(str, spec.submodule_search_locations or [])])
"""


def test_the_name_kernels_is_not_ours(installed: Path, tmp_path: Path) -> None:
    """Hugging Face publishes a package of that name; -P leaves the current folder out of sys.path."""
    assert str(ROOT) not in python(WHOSE_KERNELS, tmp_path, ("-P",))
    assert str(installed.parent) not in run(installed / "python", "-P", "-c", WHOSE_KERNELS, cwd=tmp_path)


def test_transformers_works_beside_our_folder_kernels() -> None:
    """With the repository as current folder `import kernels` finds ours: transformers must not take it for its own."""
    assert python("from transformers import CLIPTextModel; print(CLIPTextModel.__name__)", ROOT) == "CLIPTextModel\n"


IMPORTED = "import sys; print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)))"


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    assert python(f"import ledits_min; ledits_min.InputError; ledits_min.__version__; {IMPORTED}", tmp_path) == "[]\n"


@pytest.mark.parametrize("command", [[], ["edit"], ["invert"], ["inspect"], ["web"]], ids=" ".join)
def test_help_imports_no_torch(command: list[str], tmp_path: Path) -> None:
    """Help is asked for often and answered at once."""
    code = f"""
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, "transformers" in sys.modules))
from ledits_min.app.cli import main
sys.argv = ["ledits", *{command!r}, "--help"]
sys.exit(main())
"""
    printed = python(code, tmp_path).splitlines()
    assert printed[0].startswith("usage: ledits")
    assert printed[-1] == "False False"


def test_the_lazy_names_are_the_real_ones() -> None:
    """`from ledits_min import *` gives the contract's names, and a wrong one says what is wrong."""
    import ledits_min
    from ledits_min.pipeline import LEdits

    assert ledits_min.LEdits is LEdits
    assert set(ledits_min.__all__) <= set(dir(ledits_min))
    assert all(hasattr(ledits_min, name) for name in ledits_min.__all__)
    with pytest.raises(AttributeError, match=r"'ledits_min' has no attribute 'LEdit'"):
        _ = ledits_min.LEdit

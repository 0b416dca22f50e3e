"""What the nodes ask of ComfyUI: its folders, its device, its progress bar and its cancel button.

ComfyUI's modules are imported inside the functions, so that this package can be imported without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ledits_min.errors import InputError, quoted

if TYPE_CHECKING:
    import torch

    from ledits_min import Progress
    from ledits_min.engine.progress import Callback

EMBEDDED = "tiny (embedded model)"
FOLDERS = {" [diffusers]": "diffusers", " [diffusion_models]": "diffusion_models"}  # a name's ending -> where it lies


def model_files(folder: str) -> list[str]:
    """The safetensors files of one of ComfyUI's model folders, by the names that ComfyUI gives them."""
    import folder_paths

    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith((".safetensors", ".sft"))]


def model_names() -> list[str]:
    """What the load node offers: the embedded model, checkpoints, diffusers folders, UNets alone."""
    import folder_paths

    folders = {
        path.parent.relative_to(root).as_posix()
        for root in folder_paths.get_folder_paths("diffusers")
        for path in sorted(Path(root).glob("**/model_index.json"))
    }
    return [
        EMBEDDED,
        *model_files("checkpoints"),
        *(f"{name} [diffusers]" for name in sorted(folders)),
        *(f"{name} [diffusion_models]" for name in model_files("diffusion_models")),
    ]


def model_path(name: str) -> str:
    """What `LEdits.from_pretrained` takes for a name that `model_names` gave."""
    import folder_paths

    if name == EMBEDDED:
        return "tiny"
    for ending, folder in FOLDERS.items():
        if name.endswith(ending):
            inner = name.removesuffix(ending)
            if folder != "diffusers":
                return file_path(folder, inner)
            for root in folder_paths.get_folder_paths(folder):
                if _within(root, inner) and Path(root, inner, "model_index.json").is_file():
                    return os.path.join(root, inner)
            raise InputError(f"{quoted(inner)} is not in ComfyUI's models/diffusers; refresh, and choose another")
    return file_path("checkpoints", name)


def file_path(folder: str, name: str) -> str:
    """The path of a file in one of ComfyUI's model folders; InputError where it is gone."""
    import folder_paths

    if name not in model_files(folder):
        raise InputError(f"{quoted(name)} is not among the files of ComfyUI's models/{folder}; refresh, choose another")
    return str(folder_paths.get_full_path(folder, name))


def saved_inversions() -> list[str]:
    """Safetensors files of ComfyUI's input folder, and those of its output folder marked as ComfyUI marks them."""
    import folder_paths

    places = {"": folder_paths.get_input_directory(), " [output]": folder_paths.get_output_directory()}
    return [
        f"{path.relative_to(root).as_posix()}{mark}"
        for mark, root in places.items()
        for path in sorted(Path(root).glob("**/*.safetensors"))
    ]


def saved_path(name: str) -> Path:
    """The path of a name that `saved_inversions` gave; InputError where it is gone."""
    import folder_paths

    path = Path(folder_paths.get_annotated_filepath(name))
    places = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    if not path.is_file() or not any(_within(root, path) for root in places):
        raise InputError(f"{quoted(name)} is not in ComfyUI's input or output folder; refresh, and choose another")
    return path


def new_output(prefix: str) -> tuple[Path, dict[str, str]]:
    """Where the next file of this prefix goes in the output folder, and how ComfyUI calls it in its history."""
    import folder_paths

    folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    name = f"{stem}_{counter:05}_.safetensors"
    return Path(folder, name), {"filename": name, "subfolder": subfolder, "type": "output"}


def device() -> torch.device:
    """Where ComfyUI computes."""
    import comfy.model_management

    chosen: torch.device = comfy.model_management.get_torch_device()
    return chosen


def follow(phase: str, runs: int = 1) -> Callback:
    """A callback that moves the node's bar through `runs` runs of `phase`, and ends the run when it is cancelled."""
    import comfy.model_management
    import comfy.utils

    bar, finished = comfy.utils.ProgressBar(runs), 0

    def callback(progress: Progress) -> None:
        nonlocal finished
        comfy.model_management.throw_exception_if_processing_interrupted()
        if progress.phase == phase:
            bar.update_absolute(finished * progress.total + progress.done, runs * progress.total)
            finished += progress.done == progress.total

    return callback


def _within(root: str, path: str | Path) -> bool:
    return Path(root, path).resolve().is_relative_to(Path(root).resolve())

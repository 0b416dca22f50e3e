"""The nodes: load, LoRA, embedding, invert, save and load an inversion, concept, edit, sweep.

An InputError is the node's error as it stands: ComfyUI shows its one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ledits_min.app.cli.options import DTYPES, build_parser
from ledits_min.app.comfyui import host
from ledits_min.app.values import CONCEPT_KEYS
from ledits_min.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ledits_min import Concept, Inversion, LEdits

Inputs = dict[str, dict[str, tuple[Any, dict[str, Any]]]]

OWN = -1  # of a number: the model's own default
ITS_OWN = "the model's own"  # of a part
NOTHING = "nothing"
MODEL, INVERSION, CONCEPTS = "LEDITS_MODEL", "LEDITS_INVERSION", "LEDITS_CONCEPTS"
LORAS, EMBEDDINGS = "LEDITS_LORAS", "LEDITS_EMBEDDINGS"
SWEPT = (
    *CONCEPT_KEYS, "skip", "steps", "guidance_scale", "source_guidance_scale", "momentum_scale", "momentum_beta",
    "eta", "seed",
)  # fmt: skip


def _number(default: float, low: float, high: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": 0.01, "round": False, "tooltip": tooltip}


def _whole(default: int, low: int, high: int, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, "tooltip": tooltip}


def _text(tooltip: str, default: str = "", multiline: bool = True) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": default, "multiline": multiline, "tooltip": tooltip}


def _choice(choices: Sequence[str], tooltip: str) -> tuple[list[str], dict[str, Any]]:
    return list(choices), {"tooltip": tooltip}


def _inversion_inputs() -> dict[str, tuple[Any, dict[str, Any]]]:
    """How the picture is inverted; named as in `LEdits.invert`."""
    return {
        "source": _text("The picture as it is, in words; may stay empty."),
        "num_steps": _whole(OWN, OWN, 500, "Steps of the whole schedule. -1: the model's own (paper: 100)."),
        "skip": _whole(
            OWN, OWN, 499, "How many of the noisiest steps are left out: more keeps more of the picture. "
            "-1: the model's own (paper: 36 of 100).",
        ),
        "source_guidance_scale": _number(OWN, OWN, 1000.0, "Strength of the source text. -1: the model's own."),
        "eta": _number(1.0, 0.0, 1.0, "Noise of the steps: 1 is DDPM, as in the paper."),
        # A seed that changes with every run would invert again every time.
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": False,
                         "tooltip": "Seed of the noise maps."}),
        "size": _whole(
            OWN, OWN, 4096, "The longer side, in pixels, that the model works at. -1: the size it was trained at."
        ),
    }  # fmt: skip


def _edit_inputs() -> dict[str, tuple[Any, dict[str, Any]]]:
    """What the picture becomes besides its concepts; named as in `LEdits.edit`."""
    return {
        "target": _text("The new picture in words; may stay empty where there are concepts."),
        "negative": _text("What the picture should not show."),
        "guidance_scale": _number(OWN, OWN, 1000.0, "Strength of the target. -1: the model's own (paper: 15)."),
        "momentum_scale": _number(0.0, 0.0, 0.999, "Strength of SEGA's momentum; LEDITS has none."),
        "momentum_beta": _number(0.6, 0.0, 0.999, "How long the momentum lasts."),
        "output_size": _choice(
            ("input", "model"), "input: the change, laid over the original pixels. model: the model's own picture."
        ),
    }


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value == OWN else value for name, value in settings.items()}


class LoadModel:
    CATEGORY = "LEDITS"
    DESCRIPTION = "Loads a Stable Diffusion 1.x, 2.x or XL checkpoint for LEDITS. Only safetensors are read."
    RETURN_TYPES, RETURN_NAMES, FUNCTION = (MODEL,), ("model",), "load"
    OUTPUT_TOOLTIPS = ("The model, for every other LEDITS node.",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": _choice(
                    host.model_names(), "A file of models/checkpoints, a folder of models/diffusers, or a UNet of "
                    "models/diffusion_models, which needs a VAE and a text encoder besides.",
                ),
                "dtype": _choice(DTYPES, "auto: float16 on a GPU, else what the CPU computes in."),
            },
            "optional": {
                "loras": (LORAS, {"tooltip": "LoRAs, merged into the weights in the order of their chain."}),
                "embeddings": (EMBEDDINGS, {"tooltip": "Textual inversions."}),
                "vae": _choice([ITS_OWN, *host.model_files("vae")], "Another VAE."),
                "text_encoder": _choice([ITS_OWN, *host.model_files("text_encoders")], "Another text encoder."),
                "prediction_type": _choice([ITS_OWN, "epsilon", "v_prediction"], "What the UNet predicts."),
                "clip_skip": _whole(
                    OWN, OWN, 24, "The text encoder's layer to read, counted from the last, which is 1. -1: its own."
                ),
                "ema": ("BOOLEAN", {"default": False, "tooltip": "Take the averaged weights of a file with both."}),
                "insist": ("BOOLEAN", {
                    "default": False,
                    "tooltip": "Load what is refused for a name in it, where its tensors are sound.",
                }),
            },
        }  # fmt: skip

    def load(self, model: str, dtype: str, **parts: Any) -> tuple[LEdits]:
        from ledits_min import LEdits

        for name, folder in (("vae", "vae"), ("text_encoder", "text_encoders")):
            chosen = parts.get(name, ITS_OWN)
            parts[name] = None if chosen == ITS_OWN else host.file_path(folder, chosen)
        if parts.get("prediction_type") == ITS_OWN:
            del parts["prediction_type"]
        kinds = {"lora": parts.pop("loras", ()), "embedding": parts.pop("embeddings", ())}
        return (
            LEdits.from_pretrained(host.model_path(model), device=host.device(), dtype=dtype, **kinds, **_given(parts)),
        )


class Lora:
    CATEGORY = "LEDITS"
    DESCRIPTION = "A LoRA, LoHa, LoKr or DoRA of models/loras to load with the model. Chain several of these."
    RETURN_TYPES, RETURN_NAMES, FUNCTION = (LORAS,), ("loras",), "add"
    OUTPUT_TOOLTIPS = ("This LoRA behind those that came in.",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "lora": _choice(host.model_files("loras"), "A file of models/loras."),
                "strength": _number(1.0, -100.0, 100.0, "Factor on what it changes, in UNet and text encoder alike."),
            },
            "optional": {"loras": (LORAS, {"tooltip": "LoRAs that come before this one."})},
        }

    def add(
        self, lora: str, strength: float, loras: tuple[tuple[str, float], ...] = ()
    ) -> tuple[tuple[tuple[str, float], ...]]:
        return ((*loras, (host.file_path("loras", lora), strength)),)


class Embedding:
    CATEGORY = "LEDITS"
    DESCRIPTION = "A textual inversion of models/embeddings to load with the model. Chain several of these."
    RETURN_TYPES, RETURN_NAMES, FUNCTION = (EMBEDDINGS,), ("embeddings",), "add"
    OUTPUT_TOOLTIPS = ("This embedding behind those that came in.",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "embedding": _choice(host.model_files("embeddings"), "A file of models/embeddings."),
                "word": _text("The word that stands for it in prompts. Empty: the file's own.", multiline=False),
            },
            "optional": {"embeddings": (EMBEDDINGS, {"tooltip": "Embeddings that come before this one."})},
        }

    def add(
        self, embedding: str, word: str, embeddings: tuple[tuple[str, str | None], ...] = ()
    ) -> tuple[tuple[tuple[str, str | None], ...]]:
        return ((*embeddings, (host.file_path("embeddings", embedding), word.strip() or None)),)


class Invert:
    CATEGORY = "LEDITS"
    DESCRIPTION = "Finds the noise maps that lead back to a picture. Made once, edited as often as you like."
    RETURN_TYPES, RETURN_NAMES, FUNCTION = (INVERSION,), ("inversion",), "invert"
    OUTPUT_TOOLTIPS = ("The inversion of every picture of the batch.",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (MODEL, {"tooltip": "A model from the LEDITS load node."}),
                "image": ("IMAGE", {"tooltip": "One picture, or a batch of them."}),
                **_inversion_inputs(),
            }
        }

    def invert(self, model: LEdits, image: Tensor, **settings: Any) -> tuple[Inversion]:
        from ledits_min.app.comfyui.pictures import to_pictures

        return (model.invert(to_pictures(image), callback=host.follow("inverting"), **_given(settings)),)


class SaveInversion:
    CATEGORY = "LEDITS"
    DESCRIPTION = "Writes an inversion into ComfyUI's output folder."
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save", True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "inversion": (INVERSION, {"tooltip": "The inversion to keep."}),
                "filename_prefix": _text("What its file name begins with.", "inversions/ledits", multiline=False),
            }
        }

    def save(self, inversion: Inversion, filename_prefix: str) -> dict[str, Any]:
        path, entry = host.new_output(filename_prefix)
        inversion.save(path)
        return {"ui": {"inversions": [entry]}}


class LoadInversion:
    CATEGORY = "LEDITS"
    DESCRIPTION = "Reads a saved inversion from ComfyUI's input or output folder."
    RETURN_TYPES, RETURN_NAMES, FUNCTION = (INVERSION, "IMAGE"), ("inversion", "originals"), "load"
    OUTPUT_TOOLTIPS = ("The inversion, for the model it was made with.", "The pictures as they were inverted.")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"inversion": _choice(host.saved_inversions(), "What the save node wrote, or a file of input.")}
        }

    @classmethod
    def IS_CHANGED(cls, inversion: str) -> str:
        state = host.saved_path(inversion).stat()
        return f"{state.st_mtime_ns} {state.st_size}"

    def load(self, inversion: str) -> tuple[Inversion, Tensor]:
        from PIL import Image

        from ledits_min import Inversion
        from ledits_min.app.comfyui.pictures import to_image

        read = Inversion.load(host.saved_path(inversion))
        return read, to_image([Image.fromarray(original.numpy()) for original in read.originals])


class AddConcept:
    CATEGORY = "LEDITS"
    DESCRIPTION = "One thing to add to a picture, or to remove from it. Chain several of these."
    RETURN_TYPES, RETURN_NAMES, FUNCTION = (CONCEPTS,), ("concepts",), "add"
    OUTPUT_TOOLTIPS = ("This concept behind those that came in.",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "text": _text("The concept in words, such as sunglasses.", multiline=False),
                "direction": _choice(("add", "remove"), "Towards the concept or away from it."),
                "guidance_scale": _number(OWN, OWN, 1000.0, "Its strength. -1: the model's own (paper: 7)."),
                "threshold": _number(
                    OWN, OWN, 1.0, "The share of the picture that it leaves alone. -1: the model's own (paper: 0.95)."
                ),
                "warmup_steps": _whole(OWN, OWN, 500, "The first step in which it acts. -1: its own (paper: 1)."),
                "cooldown_steps": _whole(OWN, OWN, 500, "The first step in which it acts no more. -1: to the end."),
                "weight": _number(1.0, 0.0, 1000.0, "Factor on its strength."),
            },
            "optional": {"concepts": (CONCEPTS, {"tooltip": "Concepts that act beside this one."})},
        }

    def add(
        self, text: str, direction: str, concepts: tuple[Concept, ...] = (), **numbers: Any
    ) -> tuple[tuple[Concept, ...]]:
        from ledits_min import Concept

        if not text.strip():
            raise InputError("the concept's text is empty; write what to add or to remove")
        return ((*concepts, Concept(text.strip(), reverse=direction == "remove", **_given(numbers))),)


class Edit:
    CATEGORY = "LEDITS"
    DESCRIPTION = "Denoises an inverted picture again under concepts, a target text, or both."
    RETURN_TYPES, RETURN_NAMES, FUNCTION = ("IMAGE", "MASK"), ("images", "masks"), "edit"
    OUTPUT_IS_LIST = (False, True)
    OUTPUT_TOOLTIPS = (
        "The edited pictures.",
        "A list of one mask per concept, in the order of their chain: where it acted. Without concepts an empty mask.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The model that the inversion was made with."}),
                "inversion": (INVERSION, {"tooltip": "From the invert node, or a saved one."}),
                **_edit_inputs(),
            },
            "optional": {"concepts": (CONCEPTS, {"tooltip": "What to add and to remove."})},
        }

    def edit(
        self, model: LEdits, inversion: Inversion, concepts: tuple[Concept, ...] = (), **settings: Any
    ) -> tuple[Tensor, list[Tensor]]:
        import torch

        from ledits_min.app.comfyui.pictures import to_image, to_mask

        result = model.edit(inversion, concepts=concepts, callback=host.follow("editing"), **_given(settings))
        images = to_image(result.images)
        return images, [to_mask(mask, images) for mask in result.masks] or [torch.zeros(images.shape[:3])]


class Sweep:
    CATEGORY = "LEDITS"
    DESCRIPTION = "Tries values of one or two numbers of an edit against each other."
    RETURN_TYPES, RETURN_NAMES, FUNCTION = ("IMAGE", "IMAGE"), ("sheet", "images"), "sweep"
    OUTPUT_TOOLTIPS = ("All edits on one labelled sheet.", "The edits by themselves, row by row.")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (MODEL, {"tooltip": "A model from the LEDITS load node."}),
                "image": ("IMAGE", {"tooltip": "One picture."}),
                "across": _choice(SWEPT, "The number that changes from column to column."),
                "across_values": _text("Its values, with commas between them.", "1, 2, 4", multiline=False),
                "down": _choice((NOTHING, *SWEPT), "The number that changes from row to row."),
                "down_values": _text("Its values, with commas between them.", multiline=False),
                **_inversion_inputs(),
                **_edit_inputs(),
            },
            "optional": {
                "concepts": (CONCEPTS, {"tooltip": "What to change. A number that is swept is left at -1 there."})
            },
        }  # fmt: skip

    def sweep(
        self, model: LEdits, image: Tensor, concepts: tuple[Concept, ...] = (), **settings: Any
    ) -> tuple[Tensor, Tensor]:
        from ledits_min.app import outputs
        from ledits_min.app.comfyui.pictures import to_image, to_pictures
        from ledits_min.app.inputs import check_prompt, texts_of
        from ledits_min.app.sweep import grid as sweep
        from ledits_min.files.opening import open_pictures

        pictures = open_pictures(to_pictures(image))
        if len(pictures) > 1:
            raise InputError(f"a sweep is of one picture and {len(pictures)} came; choose one of the batch")
        args = _sweep_options(concepts, settings)
        grid = sweep.Grid.of(args)
        for text in texts_of(args):
            check_prompt(model, text)  # now, not after the inversion
        follow = host.follow("editing", len(grid))
        edited, _ = sweep.run(grid, model, pictures[0], None, max(pictures[0].size), follow)
        shared = outputs.common([one.settings for row in edited for one in row])
        side = sweep.cell_side(grid, pictures[0])
        sheet = sweep.draw(grid, edited, pictures[0], side, outputs.parameters(shared))
        return to_image([sheet]), to_image([one.picture for row in edited for one in row])


def _sweep_options(concepts: Sequence[Concept], settings: Mapping[str, Any]) -> Any:
    """The options of `ledits sweep` that the node's inputs stand for; InputError where a list is none."""
    axes = [(settings["across"], settings["across_values"]), (settings["down"], settings["down_values"])]
    lists = [f"--{name.replace('_', '-')}={values}" for name, values in axes if name != NOTHING]
    if axes[0][0] == axes[1][0]:
        raise InputError(f"across and down are both {axes[0][0]}; choose two numbers, or nothing for down")
    for name, _ in axes:
        if name in CONCEPT_KEYS and not concepts:
            raise InputError(f"{name} belongs to a concept, and none came in; connect one to concepts")
    args = build_parser().parse_args(["sweep", "image", *lists])
    single = {name: value for name, value in _given(settings).items() if name in vars(args)}
    single["steps"] = _given(settings)["num_steps"]
    swept = {name for name, _ in axes}
    vars(args).update({name: value for name, value in single.items() if name not in swept})
    # A weight of 1 is no number of the concept's own.
    fields = [{n: v for n, v in asdict(one).items() if v is not None and (n, v) != ("weight", 1.0)} for one in concepts]
    args.concepts, args.said = fields, []
    return args


NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "LEditsLoadModel": LoadModel,
    "LEditsLora": Lora,
    "LEditsEmbedding": Embedding,
    "LEditsInvert": Invert,
    "LEditsSaveInversion": SaveInversion,
    "LEditsLoadInversion": LoadInversion,
    "LEditsConcept": AddConcept,
    "LEditsEdit": Edit,
    "LEditsSweep": Sweep,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LEditsLoadModel": "LEDITS Load Model",
    "LEditsLora": "LEDITS LoRA",
    "LEditsEmbedding": "LEDITS Embedding",
    "LEditsInvert": "LEDITS Invert",
    "LEditsSaveInversion": "LEDITS Save Inversion",
    "LEditsLoadInversion": "LEDITS Load Inversion",
    "LEditsConcept": "LEDITS Concept",
    "LEditsEdit": "LEDITS Edit",
    "LEditsSweep": "LEDITS Sweep",
}

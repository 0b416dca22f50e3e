"""What lies where on the page of `ledits web`. Its looks are in web.css."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ledits_min.app.web.session import Facts
from ledits_min.weights.read.survey import TINY

ROWS = 6  # concepts at a time
SAMPLES = sorted((TINY / "samples").glob("*.png"))
CUSTOM = "custom"  # a concept whose numbers are nobody's preset
ADD, REMOVE = "add", "remove"


@dataclass(frozen=True)
class Row:
    """The parts of one concept on the page."""

    box: gr.Column
    mode: gr.Radio
    text: gr.Textbox
    remove: gr.Button
    kind: gr.Dropdown
    scale: gr.Slider
    threshold: gr.Slider
    warmup: gr.Slider
    cooldown: gr.Number

    @property
    def fields(self) -> list[Any]:
        """What an edit asks for; the preset's name only says where the numbers are from."""
        return [self.mode, self.text, self.scale, self.threshold, self.warmup, self.cooldown]


class Layout:
    """The parts of the page, by the names that `web.Page` wires them up with; made inside a `gr.Blocks`."""

    def __init__(self, names: Sequence[str], first: Facts) -> None:
        self.first = first
        with gr.Row(elem_id="top"):
            gr.HTML("<h1>ledits</h1><p>Edit a real picture with words</p>", elem_id="name", padding=False)
            self.model = gr.Dropdown(
                list(names), value=names[0], label="Model", elem_id="model",
                interactive=len(names) > 1, scale=0, min_width=260,
            )  # fmt: skip
        with gr.Row(elem_id="work", equal_height=False):
            with gr.Column(scale=6, min_width=340):
                self._lay_out_picture()
            with gr.Column(scale=5, min_width=340, elem_id="controls"):
                self._lay_out_controls()

    def _lay_out_picture(self) -> None:
        with gr.Column(visible=False, elem_id="empty") as self.empty:  # until the visit has begun
            self.upload = gr.File(show_label=False, height=380, elem_id="upload")
            gr.HTML("<p>or take one of these drawn portraits</p>", elem_classes="hint", padding=False)
            self.samples = gr.Gallery(
                [str(path) for path in SAMPLES], show_label=False, columns=6, height=130,
                allow_preview=False, object_fit="cover", elem_id="samples", buttons=[], format="png",
            )  # fmt: skip
        with gr.Column(visible=False, elem_id="stage") as self.stage:
            with gr.Tabs(elem_id="views"):
                with gr.Tab("Before and after"):
                    self.slider = gr.ImageSlider(
                        type="pil", format="png", show_label=False, interactive=False, elem_id="slider",
                        buttons=["fullscreen"], max_height=480,
                    )  # fmt: skip
                with gr.Tab("Where it acted"):
                    self.masks = gr.Gallery(
                        show_label=False, columns=2, object_fit="contain", elem_id="masks", format="png",
                        buttons=["fullscreen"],
                    )  # fmt: skip
            with gr.Row(elem_id="below"):
                self.status = gr.HTML(elem_id="status", padding=False)
                self.another = gr.Button("Another picture", size="sm", scale=0, min_width=140, elem_id="another")
                self.download = gr.DownloadButton(
                    "Download PNG", size="sm", scale=0, min_width=140, interactive=False, elem_id="download"
                )
        self.history = gr.Gallery(
            show_label=False, columns=7, allow_preview=False, object_fit="cover", visible=False, elem_id="history",
            buttons=[], format="png",
        )  # fmt: skip

    def _lay_out_controls(self) -> None:
        self.rows = [self._lay_out_row(index) for index in range(ROWS)]
        self.more = gr.Button("+ another concept", size="sm", variant="secondary", elem_id="more")
        with gr.Row(elem_id="go"):
            self.run = gr.Button("Edit", variant="primary", elem_id="run", interactive=False)
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        defaults = self.first.defaults
        with gr.Accordion("Prompts", open=False, elem_id="prompts"):
            self.target = gr.Textbox("", label="Target", placeholder="the new picture in words", elem_id="target")
            self.source = gr.Textbox("", label="Source", placeholder="the picture as it is", elem_id="source")
            self.negative = gr.Textbox("", label="Negative", placeholder="what it should not show", elem_id="negative")
            self.guidance = gr.Slider(
                0, 30, defaults.guidance_scale, step=0.5, label="Target scale", buttons=[], elem_id="guidance"
            )
        with gr.Accordion("Inversion", open=False, elem_id="inversion"):
            gr.HTML("<p>Another value here inverts the picture again, once.</p>", elem_classes="hint", padding=False)
            with gr.Row():
                self.steps = _whole("Steps", defaults.num_steps, "steps")
                self.skip = _whole("Skip", defaults.skip, "skip")
                self.seed = _whole("Seed", 0, "seed")
            with gr.Row():
                self.eta = gr.Slider(0, 1, 1, step=0.05, label="Eta", buttons=[], min_width=120, elem_id="eta")
                self.size = _whole(size_label(self.first), 0, "size")
        with gr.Accordion("Copy as", open=False, visible=False, elem_id="copy") as self.copy, gr.Tabs():
            with gr.Tab("Command"):
                self.command = _code("shell", "command")
            with gr.Tab("Python"):
                self.python = _code("python", "python")

    def _lay_out_row(self, index: int) -> Row:
        defaults = self.first.defaults
        with gr.Column(visible=index == 0, elem_classes="concept") as box:
            with gr.Row(elem_classes="words"):
                mode = gr.Radio([ADD, REMOVE], value=ADD, show_label=False, container=False, scale=0, min_width=150,
                                elem_classes="mode")  # fmt: skip
                text = gr.Textbox("", show_label=False, container=False, placeholder="sunglasses", min_width=100,
                                  elem_classes="text")  # fmt: skip
                remove = gr.Button("✕", size="sm", scale=0, min_width=36, elem_classes="drop")
            with gr.Row(elem_classes="numbers"):
                preset = kind_of(self.first, *default_numbers(self.first)[:3])
                kind = gr.Dropdown(kinds(self.first), value=preset, label="Preset", min_width=110, elem_classes="kind")
                scale = _dial("Scale", 20, defaults.concept_guidance_scale, 0.1)
                threshold = _dial("Threshold", 1, defaults.threshold, 0.01)
            with gr.Accordion("When", open=False, elem_classes="timing"), gr.Row():
                warmup = _dial("From step", 100, defaults.warmup_steps, 1)
                cooldown = gr.Number(0, label="To step (0: the last)", precision=0, min_width=100)
        return Row(box, mode, text, remove, kind, scale, threshold, warmup, cooldown)


def _whole(label: str, value: int, name: str) -> gr.Number:
    return gr.Number(value, label=label, precision=0, min_width=90, elem_id=name)


def _dial(label: str, most: float, value: float, step: float) -> gr.Slider:
    name = label.split()[0].lower()
    return gr.Slider(0, most, value, step=step, label=label, min_width=120, buttons=[], elem_classes=name)


def _code(language: str, name: str) -> gr.Code:
    return gr.Code(language=language, show_label=False, elem_id=name, lines=3, max_lines=16, show_line_numbers=False,
                   buttons=["copy"])  # fmt: skip


def size_label(facts: Facts) -> str:
    return f"Size (0: {facts.native_size} px)"


def kinds(facts: Facts) -> list[str]:
    return [CUSTOM, *facts.presets]


def kind_of(facts: Facts, scale: float, threshold: float, warmup: int) -> str:
    """The preset that has these numbers."""
    numbers = (scale, threshold, warmup)
    names = (name for name, preset in facts.presets.items() if numbers == preset.numbers)
    return next(names, CUSTOM)


def default_numbers(facts: Facts) -> list[Any]:
    """Of a concept: scale, threshold, warm-up, cool-down."""
    return [facts.defaults.concept_guidance_scale, facts.defaults.threshold, facts.defaults.warmup_steps, 0]


def fresh_row(facts: Facts) -> list[Any]:
    """A row without words."""
    return [ADD, "", *default_numbers(facts)]

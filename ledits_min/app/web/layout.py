"""What lies where on the page of `ledits web`. Its looks are in web.css, its pictures and lists in views.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ledits_min.app.values import SOLVERS
from ledits_min.app.web import views
from ledits_min.app.web.form import ADD, REMOVE, ROWS, default_numbers, kind_of
from ledits_min.app.web.models import CUSTOM, Facts
from ledits_min.config import MASKS
from ledits_min.weights.read.survey import TINY

SAMPLES = sorted((TINY / "samples").glob("*.png"))
STYLE = Path(__file__).with_name("web.css")
HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">'


@dataclass(frozen=True)
class Row:
    """The parts of one concept on the page."""

    box: gr.Column
    mode: gr.Radio
    text: gr.Textbox
    remove: gr.Button
    kind: gr.Radio
    scale: gr.Slider
    threshold: gr.Slider
    warmup: gr.Slider
    cooldown: gr.Number
    mask: gr.Radio

    @property
    def fields(self) -> list[Any]:
        """What an edit asks for; the preset's name only says where the numbers are from."""
        return [self.mode, self.text, self.scale, self.threshold, self.warmup, self.cooldown, self.mask]


class Layout:
    """The parts of the page, by the names that `page.Page` wires them up with; made inside a `gr.Blocks`."""

    def __init__(self, names: Sequence[str], first: Facts, most_upload: int) -> None:
        self.first = first
        with gr.Row(elem_id="top"):
            gr.HTML("<h1>ledits</h1><p>Edit a real picture with words</p>", elem_id="name")
            self.model = gr.Dropdown(
                [(Path(name).name if len({Path(each).name for each in names}) == len(names) else name, name)
                 for name in names],
                value=names[0], label="Model", elem_id="model", filterable=False,
                interactive=len(names) > 1, scale=0, min_width=260,
            )  # fmt: skip
        with gr.Row(elem_id="work", equal_height=False):
            with gr.Column(scale=6, min_width=320):
                self._lay_out_picture(most_upload)
            with gr.Column(scale=5, min_width=320, elem_id="controls"):
                self._lay_out_controls()
        # Values that only the page's own scripts and events see.
        self.count = gr.Number(1, visible="hidden", label="concepts", elem_id="count")
        self.ready = gr.Textbox("", visible="hidden", label="ready", elem_id="ready")
        self.visit = gr.Textbox("", visible="hidden", label="visit", elem_id="visit")
        self.kept = gr.Textbox("", visible="hidden", label="kept", elem_id="kept")

    def _lay_out_picture(self, most_upload: int) -> None:
        with gr.Column(visible=False, elem_id="empty") as self.empty:  # until the visit has begun
            gr.HTML("<h2>The picture</h2>", elem_classes="heading")
            self.upload = gr.HTML(views.drop_box(most_upload), js_on_load=views.UPLOAD, elem_id="upload")
            with gr.Column(visible=self.first.embedded, elem_id="ready-made") as self.ready_made:
                gr.HTML("<h2>Ready-made edits</h2>", elem_classes="heading")
                self.examples = gr.HTML(views.examples(), js_on_load=views.CHOOSE, elem_id="examples")
            gr.HTML("<h2>Drawn portraits</h2>", elem_classes="heading")
            self.samples = gr.HTML(views.samples(len(SAMPLES)), js_on_load=views.CHOOSE, elem_id="samples")
        with gr.Column(visible=False, elem_id="stage") as self.stage:
            gr.HTML("<h2>The picture</h2>", elem_classes="heading")
            with gr.Tabs(elem_id="views"):
                with gr.Tab("Before and after"):
                    self.slider = gr.HTML(js_on_load=views.COMPARE, elem_id="slider")
                with gr.Tab("Where it acted"):
                    self.masks = gr.HTML(js_on_load=None, elem_id="masks")
            with gr.Row(elem_id="below"):
                self.status = gr.HTML(js_on_load=None, elem_id="status")
                self.another = gr.Button("Another picture", size="sm", scale=0, min_width=130, elem_id="another")
                self.download = gr.HTML(js_on_load=None, elem_id="download")
        self.message = gr.HTML(js_on_load=None, elem_id="message")
        self.history = gr.HTML(js_on_load=views.CHOOSE, elem_id="history")
        self.forget = gr.Button("Forget the history", size="sm", visible=False, elem_id="forget")

    def _lay_out_controls(self) -> None:
        gr.HTML("<h2>What to change</h2>", elem_classes="heading")
        self.rows = [self._lay_out_row(index) for index in range(ROWS)]
        self.more = gr.Button("+ another concept", size="sm", variant="secondary", elem_id="more")
        self.suggestions = gr.HTML(
            views.suggestions(), js_on_load=views.CHOOSE, visible=self.first.embedded, elem_id="suggestions"
        )
        with gr.Row(elem_id="go"):
            self.run = gr.Button(NO_PICTURE, variant="primary", elem_id="run", interactive=False)
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        defaults = self.first.defaults
        with gr.Accordion("Prompts", open=False, elem_id="prompts"):
            self.target = gr.Textbox("", label="Target", placeholder="the new picture in words", elem_id="target")
            self.source = gr.Textbox("", label="Source", placeholder="the picture as it is", elem_id="source")
            self.negative = gr.Textbox("", label="Negative", placeholder="what it should not show", elem_id="negative")
            self.guidance = gr.Slider(
                0, 30, defaults.guidance_scale, step=0.5, label="Target scale", buttons=[], elem_id="guidance",
                info="More: nearer to the target's words, further from the picture.",
            )  # fmt: skip
        with gr.Accordion("Inversion", open=False, elem_id="inversion"):
            gr.HTML("<p>Another value here inverts the picture again, once.</p>", elem_classes="hint")
            with gr.Row():
                self.steps = _whole("Steps", defaults.num_steps, "steps", "More: finer, and slower.")
                self.skip = _whole("Skip", defaults.skip, "skip", "More: nearer to the picture. Less: larger changes.")
            with gr.Row():
                self.seed = _whole("Seed", 0, "seed", "Another seed: another variant.")
                self.dice = gr.Button("Roll the dice", size="sm", min_width=90, elem_id="dice")
            with gr.Row():
                self.eta = gr.Slider(
                    0, 1, 1, step=0.05, label="Eta", buttons=[], min_width=130, elem_id="eta",
                    info="Noise kept in each step. Less: smoother, fewer changes.",
                )  # fmt: skip
                self.size = _whole("Size", 0, "size", size_info(self.first))
            self.solver = gr.Radio(
                list(SOLVERS), value=SOLVERS[defaults.solver_order - 1], label="Solver", elem_id="solver",
                info="dpm++: steps of second order, with eta 1 alone.",
            )  # fmt: skip
        with gr.Accordion("Copy as", open=False, visible=False, elem_id="copy") as self.copy, gr.Tabs():
            with gr.Tab("Command"):
                self.command = _code("shell", "command", "The edit as a command")
            with gr.Tab("Python"):
                self.python = _code("python", "python", "The edit in Python")

    def _lay_out_row(self, index: int) -> Row:
        defaults, name = self.first.defaults, f"concept {index + 1}"
        fresh = [ADD, "", *default_numbers(self.first)]
        with gr.Column(visible=index == 0, elem_classes="concept") as box:
            with gr.Row(elem_classes="words"):
                mode = gr.Radio([ADD, REMOVE], value=ADD, label=f"Add or remove {name}", container=False, scale=0,
                                min_width=150, elem_classes="mode", show_label=False)  # fmt: skip
                text = gr.Textbox("", label=f"Words of {name}", show_label=False, container=False,
                                  placeholder="sunglasses", min_width=100, elem_classes="text")  # fmt: skip
                remove = gr.Button(f"Remove {name}", size="sm", scale=0, min_width=36, elem_classes="drop")
            kind = gr.Radio(kinds(self.first), value=kind_of(self.first, fresh), label="Preset (sets Skip, too)",
                            elem_classes="kind")  # fmt: skip
            with gr.Row(elem_classes="numbers"):
                scale = _dial("Scale", 20, defaults.concept_guidance_scale, 0.1, "More: a stronger change.")
                threshold = _dial("Threshold", 1, defaults.threshold, 0.01, "More: a smaller part of the picture.")
            with gr.Accordion("When and where", open=False, elem_classes="timing"):
                with gr.Row():
                    warmup = _dial("From step", 100, defaults.warmup_steps, 1, "Later: only details change.")
                    cooldown = gr.Number(0, label="To step", precision=0, min_width=100, info="0: to the last.")
                mask = gr.Radio(
                    list(MASKS), value=defaults.mask, label="Mask", elem_classes="mask",
                    info="Where it acts: noise, where its direction is large; attention, where its words are seen.",
                )  # fmt: skip
        return Row(box, mode, text, remove, kind, scale, threshold, warmup, cooldown, mask)


NO_PICTURE, NO_WORDS, READY = "Take a picture first", "Say what to add or remove", "Edit"

# Whether there is anything to edit, said on the button itself.
CAN_EDIT = f"""(ready, target, count, ...texts) => {{
  const asked = [target, ...texts.slice(0, count)].some(text => (text || '').trim());
  const words = !ready ? '{NO_PICTURE}' : !asked ? '{NO_WORDS}' : '{READY}';
  return {{__type__: 'update', interactive: words === '{READY}', value: words}};
}}"""
# Gradio's radio buttons each have a name of their own, so that no browser sees that they belong together.
ARROWS = """() => document.addEventListener('keydown', event => {
  const by = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (!by || event.target.type !== 'radio' || event.altKey || event.ctrlKey || event.metaKey) return;
  const group = [...event.target.closest('fieldset').querySelectorAll('input[type=radio]')];
  const next = group[(group.indexOf(event.target) + by + group.length) % group.length];
  event.preventDefault();
  next.focus();
  next.click();
})"""
ANOTHER_SEED = "() => Math.floor(Math.random() * 2 ** 31)"
# The browser's own storage: what this tab showed before it was loaded again, and the history.
RECALL = """() => {
  try { return [localStorage.getItem('ledits.history') || '', sessionStorage.getItem('ledits.visit') || '']; }
  catch (error) { return ['', '']; }
}"""
KEEP = """(kept, visit) => {
  try {
    if (visit) sessionStorage.setItem('ledits.visit', visit);
    if (kept) localStorage.setItem('ledits.history', kept);
  } catch (error) { /* the browser keeps nothing, or has no room */ }
}"""


def kinds(facts: Facts) -> list[str]:
    return [CUSTOM, *facts.presets]


def size_info(facts: Facts) -> str:
    if facts.defaults.one_size:
        return f"Longer side in pixels. 0: squares of {facts.native_size}, all that the model knows."
    return f"Longer side in pixels. 0: {facts.native_size}, which the model was trained at."


def _whole(label: str, value: int, name: str, info: str) -> gr.Number:
    return gr.Number(value, label=label, precision=0, min_width=130, elem_id=name, info=info)


def _dial(label: str, most: float, value: float, step: float, info: str) -> gr.Slider:
    name = label.split()[0].lower()
    return gr.Slider(0, most, value, step=step, label=label, min_width=130, buttons=[], elem_classes=name, info=info)


def _code(language: str, name: str, label: str) -> gr.Code:
    return gr.Code(language=language, label=label, show_label=False, elem_id=name, lines=3,
                   wrap_lines=True, show_line_numbers=False, buttons=["copy"], interactive=False)  # fmt: skip

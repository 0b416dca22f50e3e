"""The page of `ledits web`: its parts and what each does; what a visitor has done is in `web_session`, per visitor."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
from PIL import Image

from ledits_min import Concept, InputError, Stopped
from ledits_min.app import outputs
from ledits_min.app.cli import explain
from ledits_min.app.web_session import Basis, Change, Edit, Facts, Models, Picture, Session
from ledits_min.app.web_text import as_command, as_python
from ledits_min.config import check_whole
from ledits_min.weights.survey import TINY

ROWS = 6  # concepts at a time
SHOWN_SIDES = (640, 1280)  # the longer side of a picture on the page, least and most
SAMPLES = sorted((TINY / "samples").glob("*.png"))
CUSTOM = "custom"  # a concept whose numbers are nobody's preset
ADD, REMOVE = "add", "remove"
STYLE = Path(__file__).with_name("web.css")
COMPUTING = {"concurrency_id": "editor", "concurrency_limit": 1, "api_visibility": "private"}  # one at a time; the others see their place in line
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # what computes nothing never waits for what does


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


FIELDS = 6  # of a row
OUTPUTS = 9  # parts of the page that an edit changes


class Page:
    """The page around some models. `blocks` is what Gradio serves."""

    def __init__(self, models: Models, place: Path) -> None:
        self.models, self.place = models, place
        self.visits: WeakValueDictionary[str, Session] = WeakValueDictionary()
        self.first = models.facts(models.names[0])
        with gr.Blocks(title="ledits", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as blocks:
            self.session = gr.State(delete_callback=_close)
            self.count = gr.State(1)
            self._lay_out()
            self._connect(blocks)
        self.blocks: gr.Blocks = blocks.queue(max_size=64, default_concurrency_limit=4)

    # What is where.

    def _lay_out(self) -> None:
        with gr.Row(elem_id="top"):
            gr.HTML("<h1>ledits</h1><p>Edit a real picture with words</p>", elem_id="name", padding=False)
            self.model = gr.Dropdown(
                list(self.models.names), value=self.models.names[0], label="Model", elem_id="model",
                interactive=len(self.models.names) > 1, scale=0, min_width=260,
            )  # fmt: skip
        with gr.Row(elem_id="work", equal_height=False):
            with gr.Column(scale=6, min_width=340):
                self._lay_out_picture()
            with gr.Column(scale=5, min_width=340, elem_id="controls"):
                self._lay_out_controls()

    def _lay_out_picture(self) -> None:
        with gr.Column(elem_id="empty") as self.empty:
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
            show_label=False, columns=7, height=None, allow_preview=False, object_fit="cover", visible=False, elem_id="history", buttons=[], format="png",
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
                self.size = _whole(_size_label(self.first), 0, "size")
        with gr.Accordion("Copy as", open=False, visible=False, elem_id="copy") as self.copy, gr.Tabs():
            with gr.Tab("Command"):
                self.command = gr.Code(language="shell", show_label=False, elem_id="command", lines=3, max_lines=12,
                                       show_line_numbers=False, buttons=["copy"])
            with gr.Tab("Python"):
                self.python = gr.Code(language="python", show_label=False, elem_id="python", lines=3, max_lines=16,
                                      show_line_numbers=False, buttons=["copy"])

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
                kind = gr.Dropdown(_kinds(self.first), value=_kind(self.first, *_default_numbers(self.first)[:3]), label="Preset", min_width=110,
                                   elem_classes="kind")  # fmt: skip
                scale = gr.Slider(0, 20, defaults.concept_guidance_scale, step=0.1, label="Scale", min_width=120, buttons=[],
                                  elem_classes="scale")  # fmt: skip
                threshold = gr.Slider(0, 1, defaults.threshold, step=0.01, label="Threshold", min_width=120, buttons=[],
                                      elem_classes="threshold")  # fmt: skip
            with gr.Accordion("When", open=False, elem_classes="timing"), gr.Row():
                warmup = gr.Slider(0, 100, defaults.warmup_steps, step=1, label="From step", buttons=[], min_width=120, elem_classes="warmup")
                cooldown = gr.Number(0, label="To step (0: the last)", precision=0, min_width=100, elem_classes="cooldown")
        return Row(box, mode, text, remove, kind, scale, threshold, warmup, cooldown)

    # What does what.

    def _connect(self, blocks: gr.Blocks) -> None:
        fields = [part for row in self.rows for part in row.fields]
        numbers = [self.target, self.source, self.negative, self.guidance, self.steps, self.skip, self.seed, self.eta,
                   self.size]  # fmt: skip
        list_of_rows = [self.count, self.more, *(row.box for row in self.rows), *(row.kind for row in self.rows), *fields]
        view = [self.empty, self.stage, self.slider, self.masks, self.status, self.download, self.run]
        told = [self.copy, self.command, self.python]

        blocks.load(self._arrive, None, self.session, **AT_ONCE)
        blocks.unload(self._leave)
        opened = self.upload.upload(
            self._open, [self.session, self.upload], view, show_progress_on=self.upload, api_visibility="private"
        )
        _whatever_comes(opened, lambda: None, [self.upload])
        self.samples.select(self._open_sample, self.session, [*view, self.samples], **AT_ONCE)
        self.another.click(self._ask, None, [self.empty, self.stage], **AT_ONCE)

        self.more.click(self._add_row, [self.model, self.count, *fields], list_of_rows, **AT_ONCE)
        for index, row in enumerate(self.rows):
            row.remove.click(self._remove_row(index), [self.model, self.count, *fields], list_of_rows, **AT_ONCE)
            row.kind.input(
                self._take_preset, [self.model, row.kind, self.steps, self.skip],
                [row.scale, row.threshold, row.warmup, self.skip], **AT_ONCE,
            )  # fmt: skip
            for dial in (row.scale, row.threshold, row.warmup):
                dial.input(None, None, row.kind, js=f"() => '{CUSTOM}'", api_visibility="private")
        self.model.input(
            self._switch, [self.model, self.count, *fields], [self.guidance, self.steps, self.skip, self.size, *list_of_rows],
            show_progress_on=self.model, **COMPUTING,
        )  # fmt: skip

        begun = gr.on(
            [self.run.click, *(row.text.submit for row in self.rows), self.target.submit],
            _working, None, [self.run, self.stop], **AT_ONCE,
        )  # fmt: skip
        edited = begun.then(
            self._edit, [self.session, self.model, *numbers, self.count, *fields],
            [*view[2:], self.history, *told], show_progress_on=self.slider, **COMPUTING,
        )  # fmt: skip
        _whatever_comes(edited, _idle, [self.run, self.stop])
        self.stop.click(_stop, self.session, None, **AT_ONCE)
        self.history.select(
            self._restore, self.session, [*view, *told, self.model, *numbers, *list_of_rows],
            **AT_ONCE,
        )  # fmt: skip

    def _arrive(self, request: gr.Request) -> Session:
        session = Session(self.models, self.place)
        self.visits[str(request.session_hash)] = session
        return session

    def _leave(self, request: gr.Request) -> None:
        session = self.visits.get(str(request.session_hash))
        if session is not None:
            session.release()  # its files follow within the hour, should it really not come back

    def _open(self, session: Session | None, path: str) -> list[Any]:
        with _toasts():
            return _opened(_present(session).open(Path(path)))

    def _open_sample(self, session: Session | None, event: gr.SelectData) -> list[Any]:
        with _toasts():
            path = SAMPLES[event.index]
            return [*_opened(_present(session).open(path, str(path))), gr.update(selected_index=None)]

    def _ask(self) -> list[Any]:
        return [gr.update(visible=True), gr.update(visible=False)]

    def _add_row(self, model: str, count: int, *values: Any) -> list[Any]:
        facts, rows = self.models.facts(model), _in_rows(values)
        if count < ROWS:
            rows[count] = _fresh(facts)
        return _told_rows(min(count + 1, ROWS), rows, facts)

    def _remove_row(self, index: int) -> Any:
        """The rows behind close up."""

        def remove(model: str, count: int, *values: Any) -> list[Any]:
            facts, rows = self.models.facts(model), _in_rows(values)
            rows = rows[:index] + rows[index + 1 :] + [_fresh(facts)]
            return _told_rows(max(1, count - 1), rows, facts)

        return remove

    def _take_preset(self, model: str, kind: str, steps: int | None, skip: int | None) -> list[Any]:
        facts = self.models.facts(model)
        if kind not in facts.presets:
            return [gr.skip(), gr.skip(), gr.skip(), skip]
        preset = facts.presets[kind]
        return [*preset.numbers, round(preset.skip * (steps or facts.defaults.num_steps))]

    def _switch(self, model: str, count: int, *values: Any) -> list[Any]:
        """The words stay; every number becomes the other model's own."""
        with _toasts():
            facts = self.models.facts(model)
            with self.models.use(model):
                defaults = facts.defaults
        size = gr.update(value=0, label=_size_label(facts))
        rows = [[*row[:2], *_default_numbers(facts)] for row in _in_rows(values)]
        return [defaults.guidance_scale, defaults.num_steps, defaults.skip, size, *_told_rows(count, rows, facts)]

    def _edit(
        self,
        session: Session | None,
        model: str,
        target: str,
        source: str,
        negative: str,
        guidance: float,
        steps: int | None,
        skip: int | None,
        seed: int | None,
        eta: float,
        size: int | None,
        count: int,
        *values: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it here
    ) -> list[Any]:
        with _toasts():
            for name, value in (("steps", steps), ("skip", skip), ("seed", seed)):
                if value is None:
                    raise InputError(f"{name} is empty; give a whole number")
            assert steps is not None and skip is not None and seed is not None
            check_whole("steps", steps, 1, 500)
            concepts = tuple(_concept(row) for row in _in_rows(values)[:count] if row[1].strip())
            basis = Basis(steps, skip, source.strip(), float(eta), seed, size or None)
            change = Change(float(guidance), concepts, target.strip(), negative.strip())
            try:
                made = _present(session).edit(
                    model, basis, change, lambda done, what: progress(done, desc=what.capitalize())
                )
            except Stopped:
                gr.Info("Stopped; the picture is as it was.")
                return [gr.skip()] * OUTPUTS
        for notice in made.notices:
            gr.Warning(html.escape(notice))
        assert session is not None
        return [*_view(made), _thumbnails(session), *self._told(made)]

    def _restore(self, session: Session | None, event: gr.SelectData) -> list[Any]:
        with _toasts():
            history = _present(session).history
            assert session is not None
            made = history[len(history) - 1 - int(event.index)]
            session.restore(made)
            basis, change = made.basis, made.change
            numbers = [change.target, basis.source, change.negative, change.guidance_scale, basis.num_steps,
                       basis.skip, basis.seed, basis.eta, basis.size or 0]  # fmt: skip
            facts = self.models.facts(made.model)
            rows = [_as_row(concept) for concept in change.concepts]
            told = _told_rows(max(1, len(rows)), rows + [_fresh(facts)] * (ROWS - len(rows)), facts)
            hidden = [gr.update(visible=False), gr.update(visible=True)]
            return [*hidden, *_view(made), *self._told(made), made.model, *numbers, *told]

    def _told(self, made: Edit) -> list[Any]:
        given = self.models.given
        return [gr.update(visible=True), as_command(made, given), as_python(made, given)]


def _whatever_comes(event: Any, then: Any, parts: list[Any]) -> None:
    """Behind an event, whether it failed or not; Gradio's own `then` does not follow a failure everywhere."""
    for ended in (event.success, event.failure):
        ended(then, None, parts, **AT_ONCE)


@contextmanager
def _toasts() -> Iterator[None]:
    """A failure is one line on the page, as it would be one at the terminal."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:  # noqa: BLE001
        _, line = explain(error)
        raise gr.Error(html.escape(line, quote=False), print_exception=False) from None


def _present(session: Session | None) -> Session:
    if session is None:
        raise InputError("this page has lost its visit, or is still loading; reload it")
    return session


def _close(session: Session | None) -> None:
    if session is not None:
        session.close()


def _stop(session: Session | None) -> None:
    if session is not None:
        session.stop()


def _working() -> list[Any]:
    return [gr.update(visible=False), gr.update(visible=True)]


def _idle() -> list[Any]:
    return [gr.update(visible=True), gr.update(visible=False)]


def _whole(label: str, value: int, name: str) -> gr.Number:
    return gr.Number(value, label=label, precision=0, min_width=90, elem_id=name)


def _size_label(facts: Facts) -> str:
    return f"Size (0: {facts.native_size} px)"


def _kinds(facts: Facts) -> list[str]:
    return [CUSTOM, *facts.presets]


def _kind(facts: Facts, scale: float, threshold: float, warmup: int) -> str:
    """The preset that has these numbers."""
    numbers = (scale, threshold, warmup)
    names = (name for name, preset in facts.presets.items() if numbers == preset.numbers)
    return next(names, CUSTOM)


def _default_numbers(facts: Facts) -> list[Any]:
    """Of a concept: scale, threshold, warm-up, cool-down."""
    return [facts.defaults.concept_guidance_scale, facts.defaults.threshold, facts.defaults.warmup_steps, 0]


def _fresh(facts: Facts) -> list[Any]:
    """A row without words."""
    return [ADD, "", *_default_numbers(facts)]


def _in_rows(values: Sequence[Any]) -> list[list[Any]]:
    return [list(values[start : start + FIELDS]) for start in range(0, len(values), FIELDS)]


def _told_rows(count: int, rows: Sequence[Sequence[Any]], facts: Facts) -> list[Any]:
    """The count, the button for one more, which boxes are visible, the presets, and what stands in the rows."""
    boxes = [gr.update(visible=index < count) for index in range(ROWS)]
    kinds = [gr.update(choices=_kinds(facts), value=_kind(facts, *row[2:5])) for row in rows]
    return [count, gr.update(interactive=count < ROWS), *boxes, *kinds, *(value for row in rows for value in row)]


def _concept(row: Sequence[Any]) -> Concept:
    mode, text, scale, threshold, warmup, cooldown = row
    return Concept(text.strip(), float(scale), float(threshold), int(warmup), cooldown or None, reverse=mode == REMOVE)


def _as_row(concept: Concept) -> list[Any]:
    return [REMOVE if concept.reverse else ADD, concept.text, concept.guidance_scale, concept.threshold,
            concept.warmup_steps, concept.cooldown_steps or 0]  # fmt: skip


def _shown(picture: Image.Image) -> Image.Image:
    """At a size for the page; the download is untouched."""
    longer = max(picture.size)
    scale = min(max(longer, SHOWN_SIDES[0]), SHOWN_SIDES[1]) / longer
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


def _opened(picture: Picture) -> list[Any]:
    for notice in picture.notices:
        gr.Info(html.escape(notice))
    shown, (width, height) = _shown(picture.image), picture.image.size
    text = f"{html.escape(Path(picture.source).name)}, {width} x {height}. Say what to add or remove."
    return [gr.update(visible=False), gr.update(visible=True), (shown, shown), [], text,
            gr.update(value=None, interactive=False), gr.update(interactive=True)]  # fmt: skip


def _view(made: Edit) -> list[Any]:
    """Slider, masks, status, download, run."""
    before = _shown(made.picture.image)
    with Image.open(made.file) as after:
        pair = (before, _shown(after.convert("RGB")))
    masks = [
        (outputs.overlay(before, mask), f"{'-' if concept.reverse else '+'} {concept.text}: at most {100 * float(mask.max()):.0f} %")
        for concept, mask in zip(made.change.concepts, made.masks, strict=True)
    ]
    if made.inverted is None:
        times = f"Edited in {made.seconds:.1f} s; the inversion was reused."
    else:
        times = f"Inverted in {made.inverted:.1f} s, edited in {made.seconds:.1f} s; edits reuse the inversion."
    text = f"<b>{html.escape(made.label)}</b><br>{times}"
    return [pair, masks, text, gr.update(value=str(made.file), interactive=True), gr.update(interactive=True)]


def _thumbnails(session: Session) -> Any:
    pictures = [(made.thumbnail, made.label) for made in reversed(session.history)]
    return gr.update(value=pictures, visible=True, selected_index=None)

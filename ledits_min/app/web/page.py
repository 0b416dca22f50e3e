"""The page of `ledits web`: what each of its parts does. What a visitor has done is in a `Session` of their own."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
from PIL import Image

from ledits_min import Concept, InputError, Stopped
from ledits_min.app import outputs
from ledits_min.app.cli.command import explain
from ledits_min.app.web.layout import (
    ADD,
    CUSTOM,
    REMOVE,
    ROWS,
    SAMPLES,
    Layout,
    default_numbers,
    fresh_row,
    kind_of,
    kinds,
    size_label,
)
from ledits_min.app.web.session import Basis, Change, Edit, Facts, Models, Picture, Session, words
from ledits_min.app.web.text import as_command, as_python
from ledits_min.errors import check_whole

SHOWN_SIDES = (640, 1280)  # the longer side of a picture on the page, least and most
STYLE = Path(__file__).with_name("web.css")
FIELDS = 6  # of a row
OUTPUTS = 9  # parts of the page that an edit changes

# How an event is served. The page is no API; computations run one at a time, the others are told their place in line.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
COMPUTING = PRIVATE | {"concurrency_id": "editor", "concurrency_limit": 1}
AT_ONCE = PRIVATE | {"queue": False, "show_progress": "hidden"}  # what computes nothing waits for nobody


class Page:
    """The page around some models. `blocks` is what Gradio serves."""

    def __init__(self, models: Models, place: Path) -> None:
        self.models, self.place = models, place
        self.visits: WeakValueDictionary[str, Session] = WeakValueDictionary()
        with gr.Blocks(title="ledits", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as blocks:
            session = gr.State(delete_callback=_close)
            self._connect(blocks, session, Layout(models.names, models.facts(models.names[0])))
        self.blocks: gr.Blocks = blocks.queue(max_size=64, default_concurrency_limit=4)

    def _connect(self, blocks: gr.Blocks, session: gr.State, parts: Layout) -> None:
        count = gr.State(1)
        fields = [part for row in parts.rows for part in row.fields]
        boxes, names = [row.box for row in parts.rows], [row.kind for row in parts.rows]
        numbers = [parts.target, parts.source, parts.negative, parts.guidance]
        numbers += [parts.steps, parts.skip, parts.seed, parts.eta, parts.size]
        list_of_rows = [count, parts.more, *boxes, *names, *fields]
        view = [parts.empty, parts.stage, parts.slider, parts.masks, parts.status, parts.download, parts.run]
        told = [parts.copy, parts.command, parts.python]

        blocks.load(self._arrive, None, [session, parts.empty], **AT_ONCE)
        blocks.unload(self._leave)
        opened = parts.upload.upload(
            self._open, [session, parts.upload], view, show_progress_on=parts.upload, **PRIVATE
        )
        _whatever_comes(opened, lambda: None, [parts.upload])
        parts.samples.select(self._open_sample, session, [*view, parts.samples], **AT_ONCE)
        parts.another.click(self._ask, None, [parts.empty, parts.stage], **AT_ONCE)

        parts.more.click(self._add_row, [parts.model, count, *fields], list_of_rows, **AT_ONCE)
        for index, row in enumerate(parts.rows):
            row.remove.click(self._remove_row(index), [parts.model, count, *fields], list_of_rows, **AT_ONCE)
            row.kind.input(
                self._take_preset, [parts.model, row.kind, parts.steps, parts.skip],
                [row.scale, row.threshold, row.warmup, parts.skip], **AT_ONCE,
            )  # fmt: skip
            for dial in (row.scale, row.threshold, row.warmup):
                dial.input(None, None, row.kind, js=f"() => '{CUSTOM}'", **PRIVATE)
        parts.model.input(
            self._switch, [parts.model, count, *fields],
            [parts.guidance, parts.steps, parts.skip, parts.size, *list_of_rows],
            show_progress_on=parts.model, **COMPUTING,
        )  # fmt: skip

        begun = gr.on(
            [parts.run.click, *(row.text.submit for row in parts.rows), parts.target.submit],
            _working, session, [parts.run, parts.stop], **AT_ONCE,
        )  # fmt: skip
        edited = begun.then(
            self._edit, [session, parts.model, *numbers, count, *fields],
            [*view[2:], parts.history, *told], show_progress_on=parts.slider, **COMPUTING,
        )  # fmt: skip
        _whatever_comes(edited, _idle, [parts.run, parts.stop])
        parts.stop.click(_stop, session, None, **AT_ONCE)
        parts.history.select(
            self._restore, session, [*view, *told, parts.model, *numbers, *list_of_rows],
            **AT_ONCE,
        )  # fmt: skip

    def _arrive(self, request: gr.Request) -> list[Any]:
        session = Session(self.models, self.place)
        self.visits[str(request.session_hash)] = session
        return [session, gr.update(visible=True)]

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
            rows[count] = fresh_row(facts)
        return _told_rows(min(count + 1, ROWS), rows, facts)

    def _remove_row(self, index: int) -> Any:
        """The rows behind close up."""

        def remove(model: str, count: int, *values: Any) -> list[Any]:
            facts, rows = self.models.facts(model), _in_rows(values)
            rows = rows[:index] + rows[index + 1 :] + [fresh_row(facts)]
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
        size = gr.update(value=0, label=size_label(facts))
        rows = [[*row[:2], *default_numbers(facts)] for row in _in_rows(values)]
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
            told = _told_rows(max(1, len(rows)), rows + [fresh_row(facts)] * (ROWS - len(rows)), facts)
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


def _working(session: Session | None) -> list[Any]:
    if session is not None:
        session.begin()
    return [gr.update(visible=False), gr.update(visible=True)]


def _idle() -> list[Any]:
    return [gr.update(visible=True), gr.update(visible=False)]


def _in_rows(values: Sequence[Any]) -> list[list[Any]]:
    return [list(values[start : start + FIELDS]) for start in range(0, len(values), FIELDS)]


def _told_rows(count: int, rows: Sequence[Sequence[Any]], facts: Facts) -> list[Any]:
    """The count, the button for one more, which boxes are visible, the presets, and what stands in the rows."""
    boxes = [gr.update(visible=index < count) for index in range(ROWS)]
    presets = [gr.update(choices=kinds(facts), value=kind_of(facts, *row[2:5])) for row in rows]
    return [count, gr.update(interactive=count < ROWS), *boxes, *presets, *(value for row in rows for value in row)]


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
        (outputs.overlay(before, mask), f"{words(concept)}: at most {100 * float(mask.max()):.0f} %")
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

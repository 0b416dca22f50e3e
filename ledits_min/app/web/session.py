"""What one visitor of `ledits web` does, without the page: open a picture, edit it again and again, go back."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ledits_min import Concept, InputError, Inversion, LEdits, Progress
from ledits_min.app import outputs
from ledits_min.app.inputs import check_prompt
from ledits_min.config import EditDefaults
from ledits_min.errors import check_number, quoted
from ledits_min.files.opening import open_image
from ledits_min.files.write import save_image

MAX_PIXELS = 24_000_000  # of a picture: every edit in the history is as large
KEPT_INVERSIONS = 3  # so that going back to other steps, or to another picture, is free as well
KEPT_EDITS = 24

Report = Callable[[float, str], object]  # how much of a phase is done, and what it is


@dataclass(frozen=True, eq=False)
class Picture:
    """An opened picture; `source` is what a command would name it by."""

    image: Image.Image
    source: str
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Basis:
    """What an inversion depends on besides picture and model: another value, and the picture is inverted again."""

    num_steps: int
    skip: int
    source: str = ""
    eta: float = 1.0
    seed: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Change:
    """What an edit does on top of it: the arguments of `LEdits.edit` by their names."""

    guidance_scale: float
    concepts: tuple[Concept, ...] = ()
    target: str = ""
    negative: str = ""


@dataclass(frozen=True)
class Edit:
    """An entry of the history: the picture as a file with its parameters inside, and everything that led to it.

    inverted  seconds that the inversion took, None where one was there already
    """

    number: int
    model: str
    picture: Picture
    basis: Basis
    change: Change
    file: Path
    thumbnail: Image.Image
    masks: tuple[Tensor, ...]
    inverted: float | None
    seconds: float
    notices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What was asked for, in few words."""
        asked = [words(concept) for concept in self.change.concepts]
        return ", ".join(asked + [self.change.target] * bool(self.change.target)) or "reconstruction"


def words(concept: Concept) -> str:
    return f"{'-' if concept.reverse else '+'} {concept.text}"


@dataclass(frozen=True)
class Preset:
    """Numbers that suit a kind of edit; `skip` is a share of the steps."""

    guidance_scale: float
    threshold: float
    warmup_steps: int
    skip: float

    @property
    def numbers(self) -> tuple[float, float, int]:
        """Those of a concept."""
        return self.guidance_scale, self.threshold, self.warmup_steps


# Measured for the embedded model. For other checkpoints starting points: a face wants little of the map and late steps,
# a style much of it and early ones.
PRESETS_EMBEDDED = {"small thing": Preset(2.0, 0.9, 1, 4 / 25), "big thing": Preset(3.0, 0.8, 1, 2 / 25)}
PRESETS = {
    "face": Preset(7.0, 0.95, 1, 0.36),
    "object": Preset(10.0, 0.9, 1, 0.30),
    "style": Preset(7.0, 0.5, 2, 0.18),
}


@dataclass(frozen=True)
class Facts:
    """What the page has to know of a model that is not loaded any more."""

    defaults: EditDefaults
    presets: Mapping[str, Preset]
    native_size: int


class Models:
    """The models that were named, one of them loaded at a time, and one computation at a time on it."""

    def __init__(self, names: Sequence[str], device: str = "auto", dtype: str = "auto", **parts: Any) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.given: dict[str, Any] = {"device": device, "dtype": dtype, **parts}  # as `from_pretrained` takes it
        self._facts: dict[str, Facts] = {}
        self._lock = threading.Lock()
        self._loaded: tuple[str, LEdits] | None = None

    @contextmanager
    def use(self, name: str) -> Iterator[LEdits]:
        """The model of that name for as long as the block runs; the one loaded before is freed first."""
        if name not in self.names:
            raise InputError(f"{quoted(name, 60)} is not one of the models this page was started with")
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._free()
                self._loaded = name, LEdits.from_pretrained(name, **self.given)
            ledits = self._loaded[1]
            presets = PRESETS_EMBEDDED if ledits.embedded else PRESETS
            self._facts[name] = Facts(ledits.defaults, presets, ledits.native_size)
            yield ledits

    def facts(self, name: str) -> Facts:
        if name not in self._facts:
            with self.use(name):
                pass
        return self._facts[name]

    def close(self) -> None:
        with self._lock:
            self._free()

    def _free(self) -> None:
        if self._loaded is not None:
            self._loaded[1].close()
        self._loaded = None


@dataclass(eq=False)
class Session:
    """One visitor's picture, inversions and history; their files lie in a folder that goes with it."""

    models: Models
    place: Path
    picture: Picture | None = None
    history: list[Edit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="visit-", dir=self.place))
        self._inversions: OrderedDict[tuple[Picture, str, Basis], Inversion] = OrderedDict()
        self._stop = threading.Event()
        self._made = 0

    def open(self, path: Path, source: str | None = None) -> Picture:
        """Take a file as the picture to edit. InputError names it as the visitor knows it."""
        name, notices = path.name, list[str]()
        try:
            image = open_image(path, notices=notices)
        except InputError as error:
            raise InputError(str(error).replace(quoted(path), quoted(name))) from None
        if image.width * image.height > MAX_PIXELS:
            most = f"more than {MAX_PIXELS // 10**6} megapixels; scale it down first"
            raise InputError(f"{quoted(name)} is {image.width} x {image.height}, {most}")
        told = tuple(notice.replace(quoted(path), quoted(name)) for notice in notices)
        self.picture = Picture(image, source or name, told)
        return self.picture

    def edit(self, model: str, basis: Basis, change: Change, report: Report = lambda done, what: None) -> Edit:
        """Edit the picture, inverting it first only where no inversion of this picture, model and basis is there."""
        picture = self.picture
        if picture is None:
            raise InputError("there is no picture yet; drop one on the page, or take a sample")

        def callback(progress: Progress) -> bool:
            report(progress.done / progress.total, progress.phase)
            return self._stop.is_set()

        with self.models.use(model) as ledits, _heard() as notices:
            for text in (basis.source, change.target, change.negative, *(concept.text for concept in change.concepts)):
                check_prompt(ledits, text)
            check_number("guidance scale", change.guidance_scale, 0.0, 1000.0)  # now, not after the inversion
            key = picture, ledits.fingerprint, basis
            started, inverted = time.perf_counter(), None
            if key not in self._inversions:
                report(0.0, "inverting")
                inversion = ledits.invert(
                    picture.image, basis.source, num_steps=basis.num_steps, skip=basis.skip, eta=basis.eta,
                    seed=basis.seed, size=basis.size, progress=False, callback=callback,
                )  # fmt: skip
                inverted = time.perf_counter() - started
                self._inversions[key] = inversion
                if len(self._inversions) > KEPT_INVERSIONS:
                    self._inversions.popitem(last=False)
            self._inversions.move_to_end(key)
            inversion, started = self._inversions[key], time.perf_counter()
            settings: dict[str, Any] = {
                "target": change.target, "guidance_scale": change.guidance_scale, "negative": change.negative,
                "momentum_scale": 0.0, "momentum_beta": 0.6, "output_size": "input",
            }  # fmt: skip
            result = ledits.edit(inversion, concepts=change.concepts, progress=False, callback=callback, **settings)
            seconds = time.perf_counter() - started
            values = outputs.settings(ledits, inversion, change.concepts, None, settings)
        self._made += 1
        file = self._folder / f"{Path(picture.source).stem}-{self._made}.png"
        save_image(result.images[0], file, outputs.metadata(values))
        thumbnail = result.images[0].copy()
        thumbnail.thumbnail((192, 192))
        masks = tuple(mask[0] for mask in result.masks)
        made = Edit(
            self._made, model, picture, basis, change, file, thumbnail, masks, inverted, seconds, tuple(notices)
        )  # fmt: skip
        self.history.append(made)
        for old in self.history[:-KEPT_EDITS]:
            old.file.unlink(missing_ok=True)
        self.history = self.history[-KEPT_EDITS:]
        return made

    def restore(self, made: Edit) -> None:
        """Go back to an edit of the history: its picture is the one to edit again."""
        self.picture = made.picture

    def begin(self) -> None:
        """An edit is asked for; it may still stand in line when it is stopped."""
        self._stop.clear()

    def stop(self) -> None:
        """End the computation that was begun, at its next step."""
        self._stop.set()

    def release(self) -> None:
        """The page was left: what is large goes. Should it come back, its picture is inverted again."""
        self.stop()
        self._inversions.clear()

    def close(self) -> None:
        """Forget everything and delete its files."""
        self.release()
        self.history.clear()
        self.picture = None
        shutil.rmtree(self._folder, ignore_errors=True)


_ears: ContextVar[list[str] | None] = ContextVar("ears", default=None)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings of this thread, while `warnings_to_visitors` runs."""
    heard: list[str] = []
    token = _ears.set(heard)
    try:
        yield heard
    finally:
        _ears.reset(token)


@contextmanager
def warnings_to_visitors() -> Iterator[None]:
    """A warning goes to the visitor whose computation it concerns; one of nobody's to where it went before.

    `warnings.catch_warnings` a computation would not do: it changes what all threads see.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        before = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            heard = _ears.get()
            if heard is not None and category is UserWarning:
                heard.append(str(message))
            else:
                before(message, category, *rest, **named)

        warnings.showwarning = show
        yield

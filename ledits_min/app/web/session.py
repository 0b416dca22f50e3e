"""What one visitor of `ledits web` does, without the page: open a picture, edit it again and again, go back."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ledits_min import Concept, InputError, Inversion, Progress
from ledits_min.app import outputs
from ledits_min.app.inputs import check_prompt
from ledits_min.app.web.models import Models
from ledits_min.app.web.notices import heard
from ledits_min.errors import check_number, quoted
from ledits_min.files.display import overlay
from ledits_min.files.opening import open_image
from ledits_min.files.write import save_image

MAX_PIXELS = 24_000_000  # of a picture: every edit in the history is as large
KEPT_INVERSIONS = 3  # so that going back to other steps, or to another picture, is free as well
KEPT_EDITS = 24
KEPT_BYTES = 512 * 2**20  # of one visit: in memory, and likewise in its folder
SHOWN_SIDES = (640, 1280)  # the longer side of a picture on the page, least and most
THUMBNAIL_SIDE = 160

Report = Callable[[float, str], object]  # how much of a phase is done, and what it is
Admit = Callable[[int, int], bool]  # whether so many more bytes have room: in memory, in files


@dataclass(frozen=True, eq=False)
class Picture:
    """An opened picture: its file, which is decoded again where pixels are wanted, and what is known of it.

    size    width, height, upright
    source  what a command would name it by
    shown   the file that the page shows
    """

    file: Path
    size: tuple[int, int]
    source: str
    notices: tuple[str, ...]
    shown: Path


@dataclass(frozen=True)
class Basis:
    """What an inversion depends on besides picture and model: another value, and the picture is inverted again."""

    num_steps: int
    skip: int
    source: str = ""
    eta: float = 1.0
    seed: int = 0
    size: int | None = None
    solver_order: int = 1


@dataclass(frozen=True)
class Change:
    """What an edit does on top of it: the arguments of `LEdits.edit` by their names."""

    guidance_scale: float
    concepts: tuple[Concept, ...] = ()
    target: str = ""
    negative: str = ""

    @property
    def label(self) -> str:
        """What was asked for, in few words."""
        asked = [words(concept) for concept in self.concepts]
        return ", ".join(asked + [self.target] * bool(self.target)) or "reconstruction"


@dataclass(frozen=True)
class Mask:
    """Where a concept acted: the file that the page shows, and the greatest share of steps at one place, 0 .. 1."""

    file: Path
    most: float


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
    folder: Path
    masks: tuple[Mask, ...]
    inverted: float | None
    seconds: float
    notices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.change.label

    @property
    def source(self) -> str:
        return self.picture.source

    @property
    def name(self) -> str:
        """What its file is called where it is taken home."""
        return f"{Path(self.source).stem}-{self.number}.png"

    @property
    def file(self) -> Path:
        return self.folder / "edit.png"

    @property
    def shown(self) -> Path:
        return self.folder / "shown.png"

    @property
    def thumbnail(self) -> Path:
        return self.folder / "thumbnail.jpg"


@dataclass(frozen=True)
class Remembered:
    """An edit of an earlier visit as the browser kept it: the words and numbers, and no picture but a small one."""

    model: str
    source: str
    basis: Basis
    change: Change
    thumbnail: Path

    @property
    def label(self) -> str:
        return self.change.label


def words(concept: Concept) -> str:
    return f"{'-' if concept.reverse else '+'} {concept.text}"


@dataclass(eq=False)
class Session:
    """One visit's picture, inversions and history; their files lie in a folder that goes with it.

    place  where that folder is made
    admit  asked before bytes are kept
    """

    models: Models
    place: Path
    admit: Admit = lambda memory, files: True
    picture: Picture | None = None
    history: list[Edit] = field(default_factory=list)
    remembered: list[Remembered] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="visit-", dir=self.place))
        self._inversions: OrderedDict[tuple[Picture, str, Basis], Inversion] = OrderedDict()
        self._stop = threading.Event()
        self._files = threading.RLock()  # a picture may be opened while an edit of another is written
        self._edited: Picture | None = None
        self._made = self._opened = 0

    @property
    def memory(self) -> int:
        """Bytes of its inversions."""
        return sum(map(_bytes_of, list(self._inversions.values())))

    @property
    def stored(self) -> int:
        """Bytes of its files."""
        with self._files:
            return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def open(self, path: Path, source: str | None = None) -> Picture:
        """Take a file as the picture to edit. InputError names it as the visitor knows it.

        A file that has a `source` stays where it is; of any other the visit keeps a copy.
        """
        name, notices = path.name, list[str]()
        try:
            image = open_image(path, notices=notices)
        except InputError as error:
            raise InputError(str(error).replace(quoted(path), quoted(name))) from None
        if image.width * image.height > MAX_PIXELS:
            most = f"more than {MAX_PIXELS // 10**6} megapixels; scale it down first"
            raise InputError(f"{quoted(name)} is {image.width} x {image.height}, {most}")
        view = shown(image)
        if not self.admit(0, _pixel_bytes(view) + (0 if source else path.stat().st_size)):
            raise InputError("the page holds as many pictures as it may; take a smaller one, or come back in a while")
        said = tuple(notice.replace(quoted(path), quoted(name)) for notice in notices)
        with self._files:
            self._opened += 1
            file, seen = path, self.folder / f"picture-{self._opened}.png"
            if not source:
                file = shutil.copyfile(path, self.folder / f"original-{self._opened}")
            view.save(seen, compress_level=1)
            self.picture = Picture(file, image.size, source or name, said, seen)
            self._forget_what_is_over()
            return self.picture

    def edit(self, model: str, basis: Basis, change: Change, report: Report = lambda done, what: None) -> Edit:
        """Edit the picture, inverting it first only where no inversion of this picture, model and basis is there."""
        with self._picture_to_edit() as picture:
            return self._edit(picture, model, basis, change, report)

    @contextmanager
    def _picture_to_edit(self) -> Iterator[Picture]:
        """Its files stay for as long as the block runs, whatever the visitor opens meanwhile."""
        with self._files:
            picture = self._edited = self.picture
        if picture is None:
            raise InputError("there is no picture yet; drop one on the page, or take a sample")
        try:
            yield picture
        finally:
            self._edited = None

    def _edit(self, picture: Picture, model: str, basis: Basis, change: Change, report: Report) -> Edit:
        def callback(progress: Progress) -> bool:
            report(progress.done / progress.total, progress.phase)
            return self._stop.is_set()

        with self.models.use(model) as ledits, heard() as notices:
            # Now, not after the inversion.
            check_number("guidance scale", change.guidance_scale, 0.0, 1000.0)
            ledits.edit_settings(change.target, change.guidance_scale, change.negative, change.concepts)
            for text in (basis.source, change.target, change.negative, *(concept.text for concept in change.concepts)):
                check_prompt(ledits, text)
            key = picture, ledits.fingerprint, basis
            started, inverted = time.perf_counter(), None
            inversion = self._inversions.get(key)
            if inversion is None:
                report(0.0, "inverting")
                inversion = ledits.invert(
                    open_image(picture.file), basis.source, num_steps=basis.num_steps, skip=basis.skip, eta=basis.eta,
                    seed=basis.seed, size=basis.size, solver_order=basis.solver_order, progress=False,
                    callback=callback,
                )  # fmt: skip
                inverted = time.perf_counter() - started
                self._keep(key, inversion)
            else:
                self._inversions.move_to_end(key)
            started = time.perf_counter()
            settings: dict[str, Any] = {
                "target": change.target, "guidance_scale": change.guidance_scale, "negative": change.negative,
                "momentum_scale": 0.0, "momentum_beta": 0.6, "output_size": "input",
            }  # fmt: skip
            result = ledits.edit(inversion, concepts=change.concepts, progress=False, callback=callback, **settings)
            seconds = time.perf_counter() - started
            values = outputs.settings(ledits, inversion, change.concepts, None, settings)
        number = self._made + 1
        folder = self.folder / str(number)
        masks = tuple(
            Mask(folder / f"mask-{index}.png", float(mask[0].max())) for index, mask in enumerate(result.masks)
        )
        made = Edit(number, model, picture, basis, change, folder, masks, inverted, seconds, tuple(notices))
        self._store(made, result, outputs.metadata(values))
        return made

    def _store(self, made: Edit, result: Any, metadata: Any) -> None:
        """Its files, and its place in the history."""
        image = result.images[0]
        if not self.admit(0, 2 * _pixel_bytes(image)):
            raise InputError("the page's disk holds as many edits as it may; come back in a while")
        with self._files:
            made.folder.mkdir(exist_ok=True)
            with Image.open(made.picture.shown) as before:
                for each, mask in zip(made.masks, result.masks, strict=True):
                    overlay(before, mask[0]).save(each.file, compress_level=1)
            thumbnail = image.copy()
            thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            thumbnail.save(made.thumbnail, quality=80)
            shown(image).save(made.shown, compress_level=1)
            save_image(image, made.file, metadata)
            self._made = made.number
            self.history.append(made)
            self._forget_what_is_over()

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
        """What is large and can be made again goes. Should the visitor come back, the picture is inverted again."""
        self._inversions.clear()

    def forget(self) -> None:
        """The history and its files go; the picture stays."""
        with self._files:
            self.history.clear()
            self.remembered.clear()
            self._forget_what_is_over()

    def close(self) -> None:
        """Forget everything and delete its files."""
        self.stop()
        self.release()
        self.history.clear()
        self.remembered.clear()
        self.picture = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self, key: tuple[Picture, str, Basis], inversion: Inversion) -> None:
        """The inversion, where there is room for it; the oldest makes way."""
        while len(self._inversions) >= KEPT_INVERSIONS or (
            self._inversions and self.memory + _bytes_of(inversion) > KEPT_BYTES
        ):
            self._inversions.popitem(last=False)
        if self.admit(_bytes_of(inversion), 0):
            self._inversions[key] = inversion

    def _pictures(self) -> list[Picture]:
        now = [picture for picture in (self.picture, self._edited) if picture is not None]
        return [made.picture for made in self.history] + now

    def _forget_what_is_over(self) -> None:
        """Of the history all but the newest, as many and as large as may be kept; then what nothing leads to."""
        while len(self.history) > KEPT_EDITS or (len(self.history) > 1 and self.stored > KEPT_BYTES):
            del self.history[0]
            self._delete_unused()
        self._delete_unused()

    def _delete_unused(self) -> None:
        pictures = self._pictures()
        for key in [key for key in self._inversions if key[0] not in pictures]:
            del self._inversions[key]
        kept = {made.folder for made in self.history} | {entry.thumbnail for entry in self.remembered}
        kept |= {path for picture in pictures for path in (picture.file, picture.shown)}
        for path in self.folder.iterdir():
            if path in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def shown(picture: Image.Image) -> Image.Image:
    """At a size for the page; what is taken home is untouched."""
    longer = max(picture.size)
    scale = min(max(longer, SHOWN_SIDES[0]), SHOWN_SIDES[1]) / longer
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


def _pixel_bytes(image: Image.Image) -> int:
    return image.width * image.height * 3


def _bytes_of(inversion: Inversion) -> int:
    values = [value if isinstance(value, tuple) else (value,) for value in vars(inversion).values()]
    return sum(each.nbytes for value in values for each in value if isinstance(each, Tensor))

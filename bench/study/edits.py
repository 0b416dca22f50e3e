"""The edits of the study: what is asked, in which words, on which portraits, and which answers count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

from ledits_min import Concept
from ledits_min.config import EditDefaults
from ledits_min.weights.train_tiny.portraits import Portrait, ideal_edit, sample_portrait, visible


@dataclass(frozen=True)
class Setting:
    """How concepts edit: one of these for local and one for global edits."""

    num_steps: int
    skip: int
    scale: float
    threshold: float
    warmup_steps: int = 1


# Chosen by bench/study/tune.py on portraits of the split "tuning"; local edits take the model's own ledits.json. What
# covers much of the picture, and what is guided away from, needs earlier steps and more of the map.
GLOBAL = Setting(num_steps=25, skip=2, scale=3.0, threshold=0.8)


@dataclass(frozen=True)
class Edit:
    """A request by concepts, and what it should lead to.

    needs    the values that a portrait may have before, by attribute
    changes  the ideal edit
    accepts  the values that count as success, where more than the ideal's do
    vague    the words leave open what the ideal edit shows, so that nearness to it means little
    """

    name: str
    group: str
    reach: str
    texts: tuple[str, ...]
    needs: Mapping[str, Sequence[str]]
    changes: Mapping[str, str]
    accepts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    reverse: bool = False
    vague: bool = False

    def accepted(self, attribute: str) -> Sequence[str]:
        return self.accepts.get(attribute, (self.changes[attribute],))

    def concepts(self, setting: Setting) -> list[Concept]:
        return [
            Concept(text, setting.scale, setting.threshold, setting.warmup_steps, reverse=self.reverse)
            for text in self.texts
        ]

    def setting(self, defaults: EditDefaults) -> Setting:
        if self.reach == "global":
            return GLOBAL
        scale = defaults.concept_guidance_scale
        return Setting(defaults.num_steps, defaults.skip, scale, defaults.threshold, defaults.warmup_steps)


ADD, REVERSE, PHRASE, CHANGE, PAIR = "addition", "removal, reversed", "removal, by phrase", "change", "two at once"
_BARE_EYES, _BARE_HEAD, _BARE_CHIN = {"eyewear": ("none",)}, {"hat": ("none",)}, {"beard": ("none",)}
_GLOOMY = {"mouth": ("serious", "sad")}


def _removal(thing: str, phrase: str, attribute: str, values: Sequence[str], vague: bool) -> tuple[Edit, Edit]:
    """The same removal asked for in both ways."""
    ideal = "serious" if attribute == "mouth" else "none"
    needs, changes = {attribute: values}, {attribute: ideal}
    accepts = {"mouth": ("serious", "sad")} if attribute == "mouth" else {}
    reach = "global" if attribute == "hat" else "local"
    return (
        Edit(f"- {thing}", REVERSE, "global", (thing,), needs, changes, accepts, reverse=True, vague=vague),
        Edit(f"+ {phrase}", PHRASE, reach, (phrase,), needs, changes, vague=vague),
    )


EDITS: tuple[Edit, ...] = (
    Edit("+ sunglasses", ADD, "local", ("sunglasses",), _BARE_EYES, {"eyewear": "sunglasses"}),
    Edit("+ glasses", ADD, "local", ("glasses",), _BARE_EYES, {"eyewear": "glasses"}),
    Edit("+ a hat", ADD, "global", ("a hat",), _BARE_HEAD, {"hat": "hat"}, vague=True),
    Edit("+ a red hat", ADD, "global", ("a red hat",), _BARE_HEAD, {"hat": "hat", "hat color": "red"}),
    Edit("+ beard", ADD, "local", ("beard",), _BARE_CHIN, {"beard": "beard"}),
    Edit("+ smiling", ADD, "local", ("smiling",), _GLOOMY, {"mouth": "smile"}),
    Edit(
        "blond hair",
        CHANGE,
        "global",
        ("blond hair",),
        {**_BARE_HEAD, "hair color": ("black", "brown", "red", "grey")},
        {"hair color": "blond"},
    ),
    Edit(
        "blue background",
        CHANGE,
        "global",
        ("blue background",),
        {"background": ("green", "yellow", "pink", "grey", "white")},
        {"background": "blue"},
    ),
    Edit(
        "a red shirt",
        CHANGE,
        "global",
        ("a red shirt",),
        {"shirt": ("blue", "green", "yellow", "black", "white")},
        {"shirt": "red"},
    ),
    *_removal("glasses", "no glasses", "eyewear", ("glasses",), vague=False),
    *_removal("sunglasses", "no sunglasses", "eyewear", ("sunglasses",), vague=False),
    *_removal("hat", "no hat", "hat", ("hat", "winter hat"), vague=True),
    *_removal("beard", "clean shaven", "beard", ("beard",), vague=False),
    *_removal("smiling", "serious", "mouth", ("smile",), vague=True),
)


def both(first: Edit, second: Edit) -> Edit:
    """Two edits at once, on portraits where each makes sense."""
    return Edit(
        f"{first.name} {second.name}",
        PAIR,
        first.reach,
        first.texts + second.texts,
        {**first.needs, **second.needs},
        {**first.changes, **second.changes},
    )


def named(name: str) -> Edit:
    return next(edit for edit in EDITS if edit.name == name)


PAIRS = (
    (named("+ sunglasses"), named("+ beard")),
    (named("+ glasses"), named("+ smiling")),
)


def portraits_of(split: str, needs: Mapping[str, Sequence[str]]) -> Iterator[Portrait]:
    """All portraits of a split that show what is needed, in order, without end."""
    drawn = (sample_portrait(f"{split} {index}") for index in count())
    return (p for p in drawn if all(p.attributes[name] in values for name, values in needs.items()))


def pick(split: str, needs: Mapping[str, Sequence[str]], number: int) -> list[Portrait]:
    return list(islice(portraits_of(split, needs), number))


# What a caption tells of every portrait, besides what the edit changes.
TOLD = ("eyewear", "hat", "beard", "mouth", "hair length")
_ABSENT = {"eyewear": "no glasses", "hat": "no hat", "beard": "no beard"}
_NOUNS = {"hair length": "hair", "hair color": "hair", "shirt": "shirt", "background": "background", "skin": "skin"}


def describe(portrait: Portrait, told: Sequence[str]) -> str:
    """A true caption in one fixed wording: what a person would give as the source or the target prompt."""
    shown = visible(portrait)
    parts = ["a portrait of a person"]
    for name in dict.fromkeys(told):
        value = shown.get(name)
        if value is None or name == "hat color":
            continue
        if name == "hat" and value != "none":
            color = f"{shown['hat color']} " if "hat color" in told else ""
            parts.append(f"a {color}{value}")
        elif name in _NOUNS:
            parts.append(f"{value} {_NOUNS[name]}")
        else:
            parts.append({"smile": "smiling"}.get(value, value) if value != "none" else _ABSENT[name])
    return ", ".join(parts)


@dataclass(frozen=True)
class Group:
    """Portraits that share a caption before the edit, and one after."""

    source: str
    target: str
    portraits: list[Portrait]


def pick_alike(split: str, edit: Edit, groups: int, each: int) -> list[Group]:
    """`groups` captions that `each` portraits have in common: prompts in full, and still whole batches."""
    told = (*TOLD, *edit.changes)
    shared: dict[tuple[str, str], list[Portrait]] = {}
    for portrait in portraits_of(split, edit.needs):
        captions = describe(portrait, told), describe(ideal_edit(portrait, edit.changes), told)
        if captions not in shared and len(shared) == groups:
            continue
        members = shared.setdefault(captions, [])
        if len(members) < each:
            members.append(portrait)
        if len(shared) == groups and all(len(members) == each for members in shared.values()):
            break
    return [Group(*captions, members) for captions, members in shared.items()]

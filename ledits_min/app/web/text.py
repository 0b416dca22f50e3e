"""An edit made on the page, said as a command and as Python: both make the same picture again.

Python does to the last bit. The command inverts and edits in one pass, where batches of other sizes round differently.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ledits_min import Concept
from ledits_min.app.cli.options import add_model_options
from ledits_min.app.values import SOLVERS
from ledits_min.app.web.session import Edit


def as_command(made: Edit, given: Mapping[str, Any]) -> str:
    """The `ledits edit` line; `given` is what the model was loaded with, as in `Models.given`."""
    basis, change = made.basis, made.change
    options: list[tuple[str, Any]] = [("--source", basis.source)]
    options += [("--steps", basis.num_steps), ("--skip", basis.skip), ("--seed", basis.seed)]
    options += [("--eta", None if basis.eta == 1.0 else basis.eta), ("--size", basis.size)]
    options += [("--solver", SOLVERS[1] if basis.solver_order == 2 else None)]
    options += [("--remove" if concept.reverse else "--add", _concept(concept)) for concept in change.concepts]
    options += [("--target", change.target), ("--negative", change.negative)]
    options += [("--guidance-scale", change.guidance_scale)]
    words = ["ledits edit", _path(made.source), _option("--model", made.model), *_model_options(given)]
    words += [_option(name, value) for name, value in options if value not in (None, "")]
    return _wrapped([*words, f"-o {_path(_output(made))}"])


def as_python(made: Edit, given: Mapping[str, Any]) -> str:
    """The program; its picture is that of the page, without the parameters in the file."""
    basis, change = made.basis, made.change
    loaded = {name: value for name, value in given.items() if value not in (None, "auto", False, [], ())}
    inverted = {"source": basis.source, "num_steps": basis.num_steps, "skip": basis.skip, "eta": basis.eta}
    inverted |= {"seed": basis.seed, "size": basis.size, "solver_order": basis.solver_order}
    edited = {"target": change.target, "negative": change.negative, "guidance_scale": change.guidance_scale}
    lines = ["from ledits_min import Concept, LEdits", ""]
    lines += [f"ledits = LEdits.from_pretrained({_arguments(made.model, loaded)})"]
    lines += [f"inversion = ledits.invert({_arguments(made.source, inverted)})"]
    lines += ["concepts = ["]
    for concept in change.concepts:
        fields: dict[str, Any] = {"guidance_scale": concept.guidance_scale, "threshold": concept.threshold}
        fields |= {"warmup_steps": concept.warmup_steps, "cooldown_steps": concept.cooldown_steps, "mask": concept.mask}
        lines += [f"    Concept({_arguments(concept.text, fields | ({'reverse': True} if concept.reverse else {}))}),"]
    lines += ["]", f"result = ledits.edit(inversion, concepts=concepts, {_arguments(None, edited)})"]
    return "\n".join([*lines, f"result.images[0].save({_literal(_output(made))})"]) + "\n"


def _path(name: str) -> str:
    """A file's name for a shell, and for a parser that would take a leading dash for an option."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def _wrapped(words: list[str], width: int = 64) -> str:
    """One command on lines of about that many characters."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def _output(made: Edit) -> str:
    return f"{Path(made.source).stem}.ledits.png"


def _option(name: str, value: Any) -> str:
    text = _number(value) if isinstance(value, float) else str(value)
    return shlex.quote(f"{name}={text}") if text.startswith("-") else f"{name} {shlex.quote(text)}"


def _model_options(given: Mapping[str, Any]) -> Iterator[str]:
    """As the parser of `ledits edit` reads them back: its defaults are left out, and a switch has no value."""
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    for name, default in vars(parser.parse_args([])).items():
        option, value = f"--{name.replace('_', '-')}", given.get(name, default)
        if not value or value == default:
            continue
        if name == "lora":
            yield from (_option(option, f"{path}:{_number(scale)}") for path, scale in value)
        else:
            yield option if default is False else _option(option, value)


def _concept(concept: Concept) -> str:
    """What --add and --remove read back."""
    numbers = {"scale": concept.guidance_scale, "threshold": concept.threshold}
    numbers |= {"warmup": concept.warmup_steps, "cooldown": concept.cooldown_steps}
    options = [f"{key}={_number(n)}" for key, n in numbers.items() if n is not None]
    return f"{concept.text}:" + ",".join([*options, f"mask={concept.mask}"] if concept.mask else options)


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _literal(value: Any) -> str:
    """As Python reads it; a string in double quotes, as people write them."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _arguments(first: str | None, named: Mapping[str, Any]) -> str:
    """Of a call; what is empty or None is the default and left out."""
    words = [] if first is None else [_literal(first)]
    return ", ".join(words + [f"{key}={_literal(value)}" for key, value in named.items() if value not in (None, "")])

"""The options of the `ledits` command: their names and help."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from ledits_min import __version__
from ledits_min.app.values import (
    CONCEPT_KEYS,
    P2P_KEYS,
    Parse,
    parse_concept,
    parse_embedding,
    parse_list,
    parse_lora,
    parse_number,
    parse_p2p,
    parse_prompt,
    parse_size,
    parse_whole,
)
from ledits_min.errors import InputError, check_number, check_whole

LIST = ",..."  # how --help marks an option that takes a list
ValueAction = Literal["store"] | type["Listed"]

_NUMBERS = {  # option -> its upper end; the lower one is 0
    "guidance_scale": 1000.0,
    "source_guidance_scale": 1000.0,
    "eta": 1.0,
    "momentum_scale": 0.999,
    "momentum_beta": 0.999,
    "scale": 1000.0,
    "threshold": 1.0,
    "weight": 1000.0,
    "cross": 1.0,
    "self": 1.0,
}
_CONCEPT_HELP = {
    "scale": "its strength",
    "threshold": "0 .. 1, the share of the picture that it leaves alone",
    "warmup": "the first executed step in which it acts",
    "cooldown": "the first executed step in which it acts no more",
    "weight": "multiplies its scale",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; every option of every command."""
    parser = _Parser(prog="ledits", description="Edit real pictures with LEDITS.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ledits {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    edit = add_command(commands, "edit", "change a picture: add or remove concepts, or give a target prompt")
    edit.add_argument("image", metavar="IMAGE|INVERSION", help="a picture, or what `ledits invert` saved")
    edit.add_argument("-o", "--output", metavar="OUT", help="PNG, JPEG or WEBP (default: <stem>.ledits.png here)")
    add_edit_options(edit)
    add_inversion_options(edit)
    add_model_options(edit)
    group = edit.add_argument_group("files")
    add_output_size(group)
    group.add_argument("--save-inversion", metavar="F", help="keep the inversion for further edits (.safetensors)")
    group.add_argument("--masks", metavar="F", help="a picture of where each concept acted")
    group.add_argument("--report", metavar="F.json", help="parameters, timings, mask statistics and trace")
    group.add_argument("--explain", action="store_true", help="only say what would be evaluated, and what it costs")
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")

    sweep = add_command(commands, "sweep", "one or two parameters of an edit against each other, on a labelled sheet")
    sweep.description = f"""{sweep.description}: give one or two of the options marked {LIST} a list of values
        (--scale 0,3,7 --skip 20,36); the first list runs across, the second down"""
    sweep.add_argument("image", metavar="IMAGE|INVERSION", help="a picture, or what `ledits invert` saved")
    sweep.add_argument("-o", "--output", metavar="SHEET", help="PNG, JPEG or WEBP, its numbers in a .json beside it "
                                                               "(default: <stem>.sweep.png here)")  # fmt: skip
    add_edit_options(sweep, Listed)
    add_shared_options(sweep)
    add_inversion_options(sweep, Listed)
    add_model_options(sweep)
    group = sweep.add_argument_group("files")
    add_output_size(group)
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")

    batch = add_command(commands, "batch", "edit many pictures, from a table or a folder; can be killed and resumed")
    batch.add_argument("jobs", metavar="JOBS", help="a .jsonl or .csv file, a row a job, or a folder of pictures")
    batch.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to write to")
    add_edit_options(batch)
    add_inversion_options(batch)
    add_model_options(batch)
    group = batch.add_argument_group("the run")
    add_output_size(group)
    group.add_argument("--batch-size", type=parse_whole, default=8, metavar="N",
                       help="edited together, where jobs differ in picture and seed alone (default: 8)")  # fmt: skip
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="this process, or Ray's workers")
    group.add_argument("--workers", type=parse_whole, metavar="N",
                       help="of --engine ray (default: one a GPU, else one a CPU)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace pictures that are no output of a batch")

    invert = add_command(commands, "invert", "find the noise maps of a picture, to edit it many times")
    invert.add_argument("image", metavar="IMAGE", help="a picture")
    invert.add_argument("-o", "--output", required=True, metavar="F.safetensors", help="the file to write")
    add_inversion_options(invert)
    add_model_options(invert)
    invert.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    demo = add_command(commands, "demo", "one sheet with what LEDITS does: reconstruction, workflows, masks, scales")
    demo.add_argument("image", metavar="IMAGE", nargs="?", help="a picture (default: a portrait shipped here)")
    demo.add_argument("-o", "--output", metavar="SHEET", default="ledits-demo.png", help="default: ledits-demo.png")
    add_model_options(demo)
    demo.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    web = add_command(commands, "web", "the same on a page in your browser, served by this machine")
    group = web.add_argument_group("the page")
    group.add_argument("--host", default="127.0.0.1", metavar="H", help="default: 127.0.0.1, this machine alone")
    group.add_argument("--port", type=parse_whole, metavar="N", help="default: the first free one from 7860")
    add_model_options(web, many=True)

    inspect = add_command(commands, "inspect", "say what a checkpoint is, from its header alone")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="what --model takes")
    add_part_options(inspect.add_argument_group("what would be passed beside it"))
    return parser


def check_ranges(args: argparse.Namespace, named: Callable[[str], str] | None = None) -> None:
    """The ranges of the public interface, before anything is loaded; `named` is how a message calls an option."""
    named = named or (lambda name: f"--{name.replace('_', '-')}")
    given = vars(args).get
    for name, high in _NUMBERS.items():
        check_number(named(name), given(name), 0.0, high, optional=True)
    steps = given("steps")
    check_whole(named("steps"), steps, 1, 500, optional=True)
    check_whole(named("skip"), given("skip"), 0, 499 if steps is None else steps - 1, optional=True)
    check_whole(named("seed"), given("seed"), 0, 2**63 - 1, optional=True)
    for name in ("warmup", "cooldown"):
        check_whole(named(name), given(name), 0, 100_000, optional=True)


def add_edit_options(parser: argparse.ArgumentParser, action: ValueAction = "store") -> None:
    """What is to change; `action` for the numbers that a sweep takes lists of."""
    group = parser.add_argument_group("the edit")
    add = functools.partial(parse_concept, reverse=False)
    remove = functools.partial(parse_concept, reverse=True)
    example = '"sunglasses" or "sunglasses:scale=10,threshold=0.9,warmup=2,cooldown=40,weight=1"'
    group.add_argument("--add", dest="concepts", action="append", type=add, metavar="C", help=f"C is {example}")
    group.add_argument("--remove", dest="concepts", action="append", type=remove, metavar="C", help="likewise")
    group.add_argument("--target", type=parse_prompt, default="", metavar="T", help="a description of the new picture")
    group.add_argument(
        "--negative", type=parse_prompt, default="", metavar="T", help="what the picture should not show"
    )
    number = functools.partial(group.add_argument, action=action, type=parse_number)
    number("--guidance-scale", metavar="S", help="strength of --target")
    group.add_argument("--p2p", nargs="?", const="", type=parse_p2p, metavar="P",
                       help="Prompt-to-Prompt from --source to --target; P is cross=0.6,self=0.2")  # fmt: skip
    number("--momentum-scale", default=0.0, metavar="S", help="SEGA's momentum (default: 0)")
    number("--momentum-beta", default=0.6, metavar="B", help="its memory (default: 0.6)")


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """The numbers of --add, --remove and --p2p as options of their own, for those that do not set theirs."""
    group = parser.add_argument_group("every concept that does not set its own")
    for name, (_, parse) in CONCEPT_KEYS.items():
        group.add_argument(f"--{name}", action=Listed, type=parse, metavar="N", help=_CONCEPT_HELP[name])
    group = parser.add_argument_group("--p2p where it does not set its own")
    for name in P2P_KEYS:
        group.add_argument(f"--{name}", action=Listed, type=parse_number, metavar="N",
                           help=f"share of the steps that lend {name}-attention")  # fmt: skip


def add_inversion_options(parser: argparse.ArgumentParser, action: ValueAction = "store") -> None:
    group = parser.add_argument_group("the inversion")
    number = functools.partial(group.add_argument, action=action)
    group.add_argument("--source", type=parse_prompt, metavar="T", help="a description of the picture as it is")
    number("--source-guidance-scale", type=parse_number, metavar="S", help="strength of --source")
    number("--steps", type=parse_whole, metavar="N", help="1 .. 500 (default: the model's, else 100)")
    number("--skip", type=parse_whole, metavar="N", help="noisiest steps to leave out (default: the model's)")
    number("--eta", type=parse_number, metavar="E", help="0 .. 1, noise of the steps (default: 1)")
    number("--seed", type=parse_whole, metavar="N", help="of the noise (default: 0)")
    group.add_argument("--size", type=parse_size, metavar="N|WxH", help="working size, longer side or both, in pixels")


def add_output_size(group: Any) -> None:
    group.add_argument("--output-size", choices=("input", "model"), default="input",
                       help="the change laid over the original pixels, or the model's own picture")  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser, many: bool = False) -> None:
    group = parser.add_argument_group("the model")
    kinds = "tiny, a .safetensors file, a diffusers folder, or org/name[@revision] in the local Hugging Face cache"
    if many:
        group.add_argument("--model", dest="models", action="append", metavar="M",
                           help=f"{kinds}; can be given many times")  # fmt: skip
    else:
        group.add_argument("--model", default="tiny", metavar="M", help=kinds)
    add_part_options(group)
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", metavar="D", help="auto, float32, bfloat16 or float16")
    group.add_argument("--compile", action="store_true", help="torch.compile the UNet: minutes at first, then faster")


def add_part_options(group: Any) -> None:
    group.add_argument("--vae", metavar="F", help="another VAE: a .safetensors file or a folder")
    group.add_argument("--text-encoder", metavar="F", help="another text encoder, likewise")
    group.add_argument("--tokenizer", metavar="D", help="another tokenizer, a folder")
    group.add_argument("--lora", action="append", type=parse_lora, metavar="FILE[:SCALE]",
                       help="merge a LoRA into the model (default scale: 1); can be given many times")  # fmt: skip
    group.add_argument("--embedding", action="append", type=parse_embedding, metavar="FILE[:WORD]",
                       help="a textual inversion, and its word (default: its own); can be repeated")  # fmt: skip
    group.add_argument("--clip-skip", type=parse_whole, metavar="N",
                       help="the text encoder's layer to read, counted from the last, which is 1")  # fmt: skip
    group.add_argument("--ema", action="store_true", help="of a file with plain and averaged (EMA) weights, the latter")
    group.add_argument("--prediction-type", choices=("eps", "v"), help="what the UNet predicts, if a file lies")


def add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


class Listed(argparse.Action):
    """One value, or a list of them with commas; `listed` of the namespace holds the lists in the order they came."""

    def __init__(self, option_strings: Sequence[str], dest: str, type: Parse, metavar: str, **more: Any) -> None:
        super().__init__(option_strings, dest, type=parse_list(type), metavar=f"{metavar}{LIST}", **more)

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None
    ) -> None:
        listed = {name: other for name, other in getattr(namespace, "listed", {}).items() if name != self.dest}
        namespace.listed = listed if len(values) == 1 else {**listed, self.dest: values}
        setattr(namespace, self.dest, values[0])


class _Parser(argparse.ArgumentParser):
    """argparse without its usage dump: a wrong option is bad input like any other."""

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += " (one that starts with - is written --option=VALUE)"
        raise InputError(f"{message}; `{self.prog} --help` lists the options")

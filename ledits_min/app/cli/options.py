"""The options of the `ledits` command: their names and help."""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from ledits_min import __version__
from ledits_min.app.values import (
    CONCEPT_KEYS,
    P2P_KEYS,
    PRESETS,
    SOLVERS,
    Parse,
    parse_concept,
    parse_device,
    parse_embedding,
    parse_list,
    parse_lora,
    parse_mask,
    parse_number,
    parse_p2p,
    parse_path,
    parse_prompt,
    parse_size,
    parse_whole,
)
from ledits_min.config import MASKS
from ledits_min.errors import InputError, check_number, check_whole, quoted

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
    "blend_threshold": 1.0,
    "weight": 1000.0,
    "cross": 1.0,
    "self": 1.0,
}
DTYPES = ("auto", "float32", "tf32", "bfloat16", "float16")
_EXPLAINED = {  # an option of another command, or one that belongs inside another option -> what to write instead
    **dict.fromkeys(
        ("--scale", "--threshold", "--warmup", "--cooldown", "--weight"),
        'it belongs to a concept: --add "hat:{name}={value}" (`ledits edit --help`)',
    ),
    **dict.fromkeys(("--cross", "--self", "--blend"), "it belongs to Prompt-to-Prompt: --p2p {name}={value}"),
    "--strength": "how much of the picture is kept is said with --skip",
    "--prompt": "the new picture is described with --target, a change with --add",
}
_CONCEPT_HELP = {
    "scale": "strength of the concept",
    "threshold": "0 .. 1, the share of the picture that the concept leaves alone",
    "warmup": "first executed step in which the concept acts",
    "cooldown": "first executed step in which the concept no longer acts",
    "weight": "factor on the scale",
    "mask": f"what says where the concept acts: {', '.join(MASKS)}",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; every option of every command."""
    parser = _Parser(
        prog="ledits", description="Edit real pictures with LEDITS.", allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"ledits {__version__}")
    parser.epilog = _examples('ledits edit photo.jpg --model org/name --add "sunglasses"', "ledits edit --help")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    parser.commands = commands.choices

    edit = add_command(
        commands, "edit", "change a picture: add or remove concepts, or describe the new picture",
        'ledits edit photo.jpg --model org/name --add "sunglasses" --remove "beard"',
        'ledits edit photo.jpg --model org/name --target "a red hat" --masks where.png',
    )  # fmt: skip
    edit.add_argument(
        "image", type=parse_path, metavar="IMAGE|INVERSION", help="a picture, or a file that `ledits invert` saved"
    )
    edit.add_argument(
        "-o", "--output", type=parse_path, metavar="OUT",
        help="file to write: PNG, JPEG or WEBP (default: <name of the picture>.ledits.png in the current folder)",
    )  # fmt: skip
    add_edit_options(edit)
    add_inversion_options(edit)
    add_model_options(edit)
    group = edit.add_argument_group("files")
    add_output_size(group)
    group.add_argument(
        "--save-inversion", type=parse_path, metavar="F", help="also keep the inversion, for more edits (.safetensors)"
    )
    group.add_argument("--masks", type=parse_path, metavar="F", help="also draw where each concept acted")
    group.add_argument(
        "--report", type=parse_path, metavar="F.json", help="also write parameters, timings, mask numbers and a trace"
    )
    group.add_argument("--explain", action="store_true", help="only say what would be evaluated, and what it costs")
    group.add_argument("--plain", action="store_true", help="run the audited loop itself, step by step")
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")

    sweep = add_command(
        commands, "sweep", "try values of one or two parameters against each other, on a labelled sheet",
        'ledits sweep photo.jpg --model org/name --add "smile" --scale 3,7,12',
        'ledits sweep photo.jpg --model org/name --add "smile" --scale 3,7,12 --skip 20,36,50 -o smile.png',
    )  # fmt: skip
    sweep.description = f"""{sweep.description}. Give one or two of the options marked {LIST} a list of values, such as
        --scale 0,3,7 --skip 20,36: the first list runs across the sheet, the second one down."""
    sweep.add_argument(
        "image", type=parse_path, metavar="IMAGE|INVERSION", help="a picture, or a file that `ledits invert` saved"
    )
    sweep.add_argument(
        "-o", "--output", type=parse_path, metavar="SHEET",
        help="sheet to write: PNG, JPEG or WEBP; its numbers go into a .json beside it "
        "(default: <name of the picture>.sweep.png in the current folder)",
    )  # fmt: skip
    add_edit_options(sweep, Listed)
    add_shared_options(sweep)
    add_inversion_options(sweep, Listed)
    add_model_options(sweep)
    group = sweep.add_argument_group("files")
    add_output_size(group)
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")

    batch = add_command(
        commands, "batch", "edit many pictures, listed in a table or lying in a folder; can be killed and resumed",
        'ledits batch photos/ -o edited --model org/name --add "sunglasses"',
        "ledits batch jobs.csv -o edited --model org/name --engine ray",
    )  # fmt: skip
    batch.add_argument(
        "jobs", type=parse_path, metavar="JOBS",
        help="a .jsonl or .csv file with one job per row, or a folder of pictures",
    )  # fmt: skip
    batch.add_argument(
        "-o", "--output", type=parse_path, required=True, metavar="DIR", help="folder to write to; it is made if needed"
    )
    add_edit_options(batch)
    add_inversion_options(batch)
    add_model_options(batch)
    group = batch.add_argument_group("the run")
    add_output_size(group)
    group.add_argument("--batch-size", type=parse_whole, default=8, metavar="N",
                       help="pictures edited together, if only picture and seed differ (default: 8)")  # fmt: skip
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="work in this process, or in Ray's workers"
    )
    group.add_argument("--workers", type=parse_whole, metavar="N",
                       help="workers of --engine ray (default: one per GPU, else one per CPU)")  # fmt: skip
    group.add_argument(
        "--overwrite", action="store_true",
        help="replace pictures that no batch has written, and those of other pictures or settings",
    )  # fmt: skip

    invert = add_command(
        commands, "invert", "find the noise maps of a picture, to edit it many times",
        "ledits invert photo.jpg --model org/name -o photo.safetensors",
        'ledits edit photo.safetensors --model org/name --add "hat"',
    )  # fmt: skip
    invert.add_argument("image", type=parse_path, metavar="IMAGE", help="a picture")
    invert.add_argument(
        "-o", "--output", type=parse_path, required=True, metavar="F.safetensors", help="file to write"
    )  # fmt: skip
    add_inversion_options(invert)
    add_model_options(invert)
    invert.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    demo = add_command(
        commands, "demo", "show on one sheet what LEDITS does: reconstruction, workflows, masks, scales",
        "ledits demo", "ledits demo photo.jpg --model org/name -o sheet.png",
    )  # fmt: skip
    demo.add_argument(
        "image", type=parse_path, metavar="IMAGE", nargs="?", help="a picture (default: a portrait that comes with us)"
    )
    demo.add_argument("-o", "--output", type=parse_path, metavar="SHEET", default="ledits-demo.png",
                      help="sheet to write (default: ledits-demo.png)")  # fmt: skip
    add_model_options(demo)
    demo.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    web = add_command(
        commands, "web", "edit on a page in your browser, served by this machine",
        "ledits web", "ledits web --model org/name --port 8000",
    )  # fmt: skip
    group = web.add_argument_group("the page")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address to serve at (default: 127.0.0.1, this machine alone)"
    )
    group.add_argument("--port", type=parse_whole, metavar="N", help="(default: the first free one from 7860 up)")
    add_model_options(web, many=True)

    inspect = add_command(
        commands, "inspect", "say what a checkpoint is, from its header alone",
        "ledits inspect model.safetensors", "ledits inspect unet.safetensors --vae vae.safetensors",
    )  # fmt: skip
    inspect.add_argument("checkpoint", type=parse_path, metavar="CHECKPOINT", help="anything that --model takes")
    add_part_options(inspect.add_argument_group("parts that would be passed with it"))
    return parser


def _examples(*lines: str) -> str:
    return "\n".join([f"example{'s' if len(lines) > 1 else ''}:", *(f"  {line}" for line in lines)])


def check_ranges(args: argparse.Namespace, named: Callable[[str], str] | None = None) -> None:
    """The ranges of the public interface, before anything is loaded; `named` is how a message calls an option."""
    named = named or (lambda name: f"--{name.replace('_', '-')}")
    given = vars(args).get
    for name, high in _NUMBERS.items():
        check_number(named(name), given(name), 0.0, high, optional=True)
    if given("preset") == "fast" and given("model") not in (None, "tiny"):
        raise InputError(
            f"--preset fast was measured on the embedded model alone; for {quoted(given('model'), 60)} try --steps 50 "
            "--skip 18, and look at what it loses"
        )
    if given("preset") == "leditspp" and given("solver") is None and given("eta") not in (None, 1.0):
        raise InputError("--preset leditspp takes the solver dpm++, for --eta 1 alone; add --solver ddpm")
    if given("solver") == "dpm++" and given("eta") not in (None, 1.0):
        raise InputError(f"{named('solver')} dpm++ is defined for {named('eta')} 1 alone, and it is {given('eta'):g}")
    steps = given("steps")
    check_whole(named("steps"), steps, 1, 500, optional=True)
    check_whole(named("skip"), given("skip"), 0, 499 if steps is None else steps - 1, optional=True)
    check_whole(named("seed"), given("seed"), 0, 2**63 - 1, optional=True)
    for name in ("warmup", "cooldown"):
        check_whole(named(name), given(name), 0, 100_000, optional=True)
    for fields in given("concepts") or []:
        where = f"{named('remove' if fields['reverse'] else 'add')} {quoted(fields['text'], 60)}"
        for key, (field_name, _) in CONCEPT_KEYS.items():
            if key == "mask":
                continue  # one of a few words, as it was parsed
            if key in _NUMBERS:
                check_number(f"{where}: {key}", fields.get(field_name), 0.0, _NUMBERS[key], optional=True)
            else:
                check_whole(f"{where}: {key}", fields.get(field_name), 0, 100_000, optional=True)
    for key, share in (given("p2p") or {}).items():
        if key == "reweight":
            for word, factor in share.items():
                check_number(f"--p2p reweight of {quoted(word, 60)}", factor, -10.0, 10.0)
        elif key != "blend":
            check_number(f"--p2p {key}", share, 0.0, _NUMBERS[key])


def check_attention(args: argparse.Namespace, saved: bool) -> None:
    """InputError where --p2p has no two prompts to work with; `saved`: the source is in an inversion."""
    if args.p2p is None:
        return
    if not saved and not (args.source or "").strip():
        raise InputError("--p2p lends the attention of --source to --target; pass --source, the picture as it is")
    if not args.target.strip():
        raise InputError("--p2p lends the attention of --source to --target; pass --target, the new picture")


def add_edit_options(parser: argparse.ArgumentParser, action: ValueAction = "store") -> None:
    """What is to change; `action` for the numbers that a sweep takes lists of."""
    group = parser.add_argument_group("the edit")
    add = functools.partial(parse_concept, reverse=False)
    remove = functools.partial(parse_concept, reverse=True)
    example = f'"sunglasses" or "sunglasses:scale=10,threshold=0.9" (its options: {", ".join(CONCEPT_KEYS)})'
    group.add_argument("--add", dest="concepts", action="append", type=add, metavar="C",
                       help=f"add a concept, such as {example}; can be given many times")  # fmt: skip
    group.add_argument("--remove", dest="concepts", action="append", type=remove, metavar="C",
                       help="remove a concept, written in the same way; can be given many times")  # fmt: skip
    if action == "store":  # a sweep takes a list
        group.add_argument("--mask", type=parse_mask, metavar="M",
                           help=f"{_CONCEPT_HELP['mask']}; for every concept that does not set its own")  # fmt: skip
    group.add_argument("--only-where", type=parse_path, metavar="MASK",
                       help="a grey picture, white where concepts may act, in the picture's shape")  # fmt: skip
    group.add_argument("--target", type=parse_prompt, default="", metavar="T", help="description of the new picture")
    group.add_argument(
        "--negative", type=parse_prompt, default="", metavar="T", help="what the picture should not show"
    )
    number = functools.partial(group.add_argument, action=action, type=parse_number)
    number("--guidance-scale", metavar="S", help="strength of --target (default: the model's, else 15)")
    group.add_argument("--p2p", nargs="?", const="", type=parse_p2p, metavar="P",
                       help="use Prompt-to-Prompt from --source to --target; P is cross=0.6,self=0.2, "
                            "reweight=WORD:2 for words of --target, and blend=WORD for words of either around which "
                            "the change stays (blend_threshold=0.3: how close)")  # fmt: skip
    number("--momentum-scale", default=0.0, metavar="S", help="strength of SEGA's momentum (default: 0)")
    number("--momentum-beta", default=0.6, metavar="B", help="how long the momentum lasts (default: 0.6)")


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """The numbers of --add, --remove and --p2p as options of their own, for those that do not set theirs."""
    group = parser.add_argument_group("every concept that does not set its own")
    for name, (_, parse) in CONCEPT_KEYS.items():
        metavar = "M" if name == "mask" else "N"
        group.add_argument(f"--{name}", action=Listed, type=parse, metavar=metavar, help=_CONCEPT_HELP[name])
    group = parser.add_argument_group("--p2p where it does not set its own")
    for name in P2P_KEYS:
        group.add_argument(f"--{name}", action=Listed, type=parse_number, metavar="N",
                           help=f"share of --steps, skipped ones included, that lend {name}-attention")  # fmt: skip


def add_inversion_options(parser: argparse.ArgumentParser, action: ValueAction = "store") -> None:
    group = parser.add_argument_group("the inversion")
    number = functools.partial(group.add_argument, action=action)
    group.add_argument("--preset", choices=PRESETS, help="other defaults, for every option that is not given: "
                       "leditspp, those of LEDITS++; fast, 10 steps of the embedded model, at the scale and threshold "
                       "of what is small (what is large, like hair, wants :scale=2.5,threshold=0.8)")  # fmt: skip
    group.add_argument("--source", type=parse_prompt, metavar="T", help="description of the picture as it is")
    number("--source-guidance-scale", type=parse_number, metavar="S", help="strength of --source")
    number("--steps", type=parse_whole, metavar="N", help="denoising steps, 1 .. 500 (default: the model's, else 100)")
    number("--skip", type=parse_whole, metavar="N", help="noisiest steps to leave out (default: the model's)")
    number("--eta", type=parse_number, metavar="E", help="noise of the steps, 0 .. 1 (default: 1)")
    group.add_argument("--solver", choices=SOLVERS, help="order of the steps: ddpm, the first, or dpm++, the second, "
                       "with eta 1 alone (default: ddpm)")  # fmt: skip
    number("--seed", type=parse_whole, metavar="N", help="seed of the noise (default: 0)")
    group.add_argument("--size", type=parse_size, metavar="N|WxH", help="size to work at: the longer side, or both")


def add_output_size(group: Any) -> None:
    group.add_argument("--output-size", choices=("input", "model"), default="input",
                       help="lay the change over the original pixels, or give the model's own picture "
                            "(default: input)")  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser, many: bool = False) -> None:
    group = parser.add_argument_group("the model")
    kinds = "tiny, a .safetensors file, a diffusers folder, or org/name[@revision] in the local Hugging Face cache"
    if many:
        group.add_argument("--model", dest="models", action="append", type=parse_path, metavar="M",
                           help=f"{kinds} (default: tiny); can be given many times")  # fmt: skip
    else:
        group.add_argument("--model", default="tiny", type=parse_path, metavar="M", help=f"{kinds} (default: tiny)")
    add_part_options(group)
    group.add_argument(
        "--device", default="auto", type=parse_device, metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    group.add_argument("--dtype", default="auto", choices=DTYPES, metavar="D",
                       help="auto, float32, bfloat16, float16, or on CUDA tf32: float32 with products that round "
                            "(default: auto)")  # fmt: skip
    group.add_argument(
        "--compile", action="store_true", help="run the UNet through torch.compile: minutes at first, then faster"
    )


def add_part_options(group: Any) -> None:
    group.add_argument("--vae", type=parse_path, metavar="F", help="use this VAE: a .safetensors file or a folder")
    group.add_argument(
        "--text-encoder", type=parse_path, metavar="F", help="use this text encoder: a .safetensors file or a folder"
    )
    group.add_argument("--tokenizer", type=parse_path, metavar="D", help="use the tokenizer in this folder")
    group.add_argument("--lora", action="append", type=parse_lora, metavar="FILE[:SCALE]",
                       help="merge a LoRA into the model (default scale: 1); can be given many times")  # fmt: skip
    group.add_argument("--embedding", action="append", type=parse_embedding, metavar="FILE[:WORD]",
                       help="a textual inversion, and its word (default: its own); can be repeated")  # fmt: skip
    group.add_argument("--clip-skip", type=parse_whole, metavar="N",
                       help="the text encoder's layer to read, counted from the last, which is 1")  # fmt: skip
    group.add_argument("--ema", action="store_true", help="take the averaged (EMA) weights of a file that holds both")
    group.add_argument("--prediction-type", choices=("eps", "v"), help="what the UNet predicts, if a file is wrong")
    group.add_argument("--insist", action="store_true",
                       help="load what is refused for a name in it, where its tensors are sound")  # fmt: skip


def add_command(commands: Any, name: str, text: str, *examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:], epilog=_examples(*examples), allow_abbrev=False,
        formatter_class=_Help,
    )  # fmt: skip
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


class _Help(argparse.HelpFormatter):
    """Lines break between words alone: "1 .. 500" and "--save-inversion" stay whole, and so do the examples."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line.replace("\xa0", " ") for line in textwrap.wrap(_whole(text), width, break_on_hyphens=False)]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example"):
            return "".join(f"{indent}{line}\n" for line in text.splitlines())
        return "\n".join(f"{indent}{line}" for line in self._split_lines(text, width))


def _whole(text: str) -> str:
    """One line in which what belongs together holds together: a range, a default, an option and its value."""
    line = " ".join(text.split())
    line = re.sub(r"(\d) \.\. (\d)", "\\1\xa0..\xa0\\2", line)
    return re.sub(r"(default:) |(--[\w-]+) (?=[\d\[])", "\\1\\2\xa0", line)


class _Parser(argparse.ArgumentParser):
    """argparse without its usage dump: a wrong option is bad input like any other."""

    commands: Mapping[str, argparse.ArgumentParser] = {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, strange = self.parse_known_args(args, namespace)
        if strange:
            command = self.commands.get(getattr(parsed, "command", ""), self)
            command.error(f"unrecognized arguments: {' '.join(strange)}{_hint(command, strange)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += " (one that starts with - is written --option=VALUE)"
        raise InputError(f"{message}; `{self.prog} --help` lists the options")


def _hint(command: argparse.ArgumentParser, strange: Sequence[str]) -> str:
    """What the first of the arguments nobody knows may have been meant for."""
    option, equals, value = strange[0].partition("=")
    value = value if equals else strange[1] if len(strange) > 1 else "N"
    if option in _EXPLAINED:
        return f" ({_EXPLAINED[option].format(name=option.lstrip('-'), value=value)})"
    known = [name for action in command._actions for name in action.option_strings]
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.7) if option.startswith("--") else []
    return f" (did you mean {near[0]}?)" if near else ""

"""The two sets of UNet weights in one LDM file: the plain ones, and their moving average (EMA) over the training.

An EMA name has lost its dots: `model.diffusion_model.out.0.bias` is averaged in `model_ema.diffusion_modelout0bias`.
So the plain names in the file spell the EMA ones; where there are none, the names of every known UNet do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ledits_min.config import UNetConfig
from ledits_min.errors import InputError
from ledits_min.weights.names import ldm, legacy
from ledits_min.weights.read.identify import Stored


def choose_weights(
    tensors: Mapping[str, Stored], ema: bool, configs: Iterable[UNetConfig], source: str
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors with one set of UNet weights under the plain names, and a note if that set is the EMA.

    `ema` asks for the average; a file that holds nothing else is read with it in any case. `configs` are the UNets
    whose names a file without plain weights may mean. Raises InputError where the average is asked for and is not
    there, or is not whole.
    """
    averaged = {name for name in tensors if name.startswith(ldm.EMA_PREFIX) and not legacy.is_buffer(name)}
    plain = [name for name in tensors if name.startswith(ldm.UNET_PREFIX)]
    if not averaged and ema:
        raise InputError(f"{source} holds no EMA weights; leave out --ema (ema=True)")
    if not averaged or (plain and not ema):
        return dict(tensors), []
    names = plain or _names_that_fit(averaged, configs)
    spelled = {_averaged_name(name): name for name in names}
    absent = [name for key, name in spelled.items() if key not in tensors]
    if absent:
        raise InputError(
            f"{source}: its EMA weights lack {len(absent)} of {len(spelled)} tensors of the UNet ('{absent[0]}', ...); "
            "leave out --ema (ema=True), or use an unmodified checkpoint"
        )
    rest = {name: tensor for name, tensor in tensors.items() if name not in averaged and name not in spelled.values()}
    note = "the EMA weights of the UNet are used" + ("" if plain else ": the file holds no others")
    return rest | {name: tensors[key] for key, name in spelled.items()}, [note]


def _averaged_name(name: str) -> str:
    return ldm.EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def _names_that_fit(averaged: set[str], configs: Iterable[UNetConfig]) -> list[str]:
    """The plain names of the known UNet whose EMA names are most of these; a wrong one is then named as incomplete."""
    tables = [[ldm.UNET_PREFIX + name for name in ldm.unet_table(config)] for config in configs]
    return max(tables, key=lambda names: sum(_averaged_name(name) in averaged for name in names) / len(names))

"""What people really pass to `ledits sweep` by mistake: one row per mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ledits_min.app.cli import main


def bad(options: str, says: str, **more: Any) -> dict[str, Any]:
    return {"name": options, "command": f"sweep p.png {options}", "says": says, **more}


SAVED = {"make": lambda workshop: main(["invert", "p.png", "--steps", "2", "--skip", "0", "-o", "i.safetensors"])}
BAD = [
    bad("", "nothing is swept; give one or two options a list"),
    bad("--add hat --scale 3", "nothing is swept"),
    bad("--add hat --scale 0,1 --skip 2,3 --seed 1,2", "--scale, --skip, --seed are lists and a sheet has two sides"),
    bad("--add hat --scale 0,1,x", "'x' is not a number"),
    bad("--add hat --scale 0,,1", "'' is not a number"),
    bad("--add hat --scale 0,1,", "'' is not a number"),
    bad("--add hat --scale 1,2,1.0", "a value is given twice in '1,2,1.0'"),
    bad("--add hat --scale 1,2000", "--scale is 2000.0; a number in 0 .. 1000"),
    bad("--add hat --threshold 0.5,1.5", "--threshold is 1.5"),
    bad("--add hat --weight 1,1001", "--weight is 1001"),
    bad("--add hat --warmup 1,1.5", "'1.5' is not a whole number"),
    bad("--add hat --warmup 1,100001", "--warmup is 100001"),
    bad("--add hat --cooldown=-1,2", "--cooldown is -1"),
    bad("--add hat --steps 10,501", "--steps is 501"),
    bad("--add hat --steps 10,20 --skip 5,15", r"--skip is 15; a whole number in 0 \.\. 9"),
    bad("--add hat --skip 2,60", "skip"),
    bad("--add hat --eta 0,1.5", "--eta is 1.5"),
    bad("--add hat --seed=0,-1", "--seed is -1"),
    bad("--add hat --momentum-scale 0,1", "--momentum-scale is 1.0"),
    bad("--target hat --guidance-scale 1,1001", "--guidance-scale is 1001"),
    bad("--add hat --size 64,128", "neither a longer side"),
    bad("--target hat --scale 1,2", "--scale is of concepts, and there is none; pass --add or --remove"),
    bad("--add hat:scale=3 --scale 1,2", "--scale has no effect: every concept sets its own"),
    bad("--add hat --guidance-scale 1,2", "--guidance-scale is swept and has no effect without --target"),
    bad("--add hat --source-guidance-scale 1,2", "has no effect without --source"),
    bad("--target hat --momentum-scale 0,0.5", "has no effect without --add or --remove"),
    bad("--add hat --momentum-beta 0,0.5", "has no effect without --momentum-scale"),
    bad("--add hat --cross 0,1", "--cross has no effect: there is no --p2p"),
    bad("--source hat --target beard --p2p cross=1 --cross 0,1", "--p2p sets its own"),
    bad("--target beard --p2p --cross 0,1", "pass --source, the picture as it is"),
    bad(f"--add hat --seed {','.join(map(str, range(51)))} --scale 1,2", "102 cells are asked for.* holds 100"),
    bad("--add zeppelin --scale 1,2", "does not know 'zeppelin'"),
    bad("--add hat --scale 1,2 -o s.gif", "must end in"),
    bad("--add hat --scale 1,2 -o ''", "must end in"),
    bad("--add hat --scale 1,2 -o s.png", "-o 's.png' exists already", files={"s.png": b"x"}),
    bad("--add hat --scale 1,2 -o s.png", "beside -o, 's.json' exists already", files={"s.json": b"x"}),
    bad("--add hat --scale 1,2 -o p.png --overwrite", "is an input of this run"),
    {"name": "saved", "command": "sweep i.safetensors --add hat --skip 1,2",
     "says": "--skip has no effect on a saved inversion", **SAVED},
    {"name": "gone", "command": "sweep gone.png --add hat --scale 1,2", "says": "'gone.png' does not exist"},
]  # fmt: skip


@pytest.mark.parametrize("row", BAD, ids=lambda row: row["name"][:60])
def test_it_ends_in_one_line(row: dict[str, Any], refused: Callable[[dict[str, Any]], None], capsys: Any) -> None:
    if "make" in row:
        make = row["make"]
        row = {**row, "make": lambda workshop: (make(workshop), capsys.readouterr())}
    refused(row)

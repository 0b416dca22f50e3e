"""The job table on Ray: the batches of `run.py` through Ray Data, one actor with its own model per GPU or CPU slot.

A worker that dies is replaced and its batch done again; what it had written is known by its hash and stays.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ledits_min.app.batch.folder import Failure
from ledits_min.app.batch.run import Batch, Editor, Outcome, Outcomes
from ledits_min.app.cli.explain import without_weights
from ledits_min.app.inputs import parts
from ledits_min.app.terminal import one_line, quiet_stderr
from ledits_min.engine.request import PromptToPrompt
from ledits_min.errors import InputError, RunError
from ledits_min.pipeline import LEdits

# Read when Ray is imported. Nothing is sent or drawn, a worker without a GPU hides none, and it yields
# to nobody, since it does the work (Ray's own default is nice 15). No line of Ray's stands among ours: what matters of
# them is told by exceptions, or by a batch that does not come back.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_worker_niceness="0",
    RAY_BACKEND_LOG_LEVEL="fatal",
    RAY_DEDUP_LOGS_SKIP_REGEX=".",
)

try:
    import ray
    import ray.data
    import ray.exceptions
except ImportError:
    raise InputError("--engine ray needs Ray; `pip install 'ledits-min[batch]'` brings it") from None

STORE = 2**27  # bytes; only numbers and outcomes pass through it
RETRIES = 3
LOST = "every worker that took its batch died; try --batch-size 1, or --engine local to see why"


class RayWorkers:
    """The cluster that RAY_ADDRESS names, else one of this machine's own that ends with the run."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.device.startswith("cuda:"):
            raise InputError(f"--device {args.device}: Ray hands the GPUs out itself; pass cuda")
        self.args, self._ended = args, ExitStack()
        try:
            _start(args.workers, self._ended)
            found = ray.cluster_resources()
            gpus = int(found.get("GPU", 0)) if args.device in ("auto", "cuda") else 0
            self.slot, slots = ({"num_gpus": 1}, gpus) if gpus else ({"num_cpus": 1}, int(found.get("CPU", 0)))
            self.workers = args.workers or slots
            if not 0 < self.workers <= slots:
                what = "GPUs" if gpus else "CPU slots"
                raise InputError(f"--workers {self.workers}: this cluster has {slots} {what}; ask for fewer")
            self.device = "cuda" if gpus else "cpu" if args.device == "auto" else args.device
            # One precision for all, whatever each finds where it runs; the driver needs no GPU of its own.
            dtype = "float16" if args.dtype == "auto" and gpus else args.dtype
            here = {"tf32": "float32"}.get(dtype, dtype) if gpus else dtype  # a name that is a GPU's alone
            ledits, _ = without_weights(args.model, "cpu" if gpus else self.device, here, **parts(args))
            self.ledits = ledits.with_preset(args.preset)
            self.ledits.runner.tf32 = dtype == "tf32"
            self.ledits.runner.compiled = args.compile  # a job's hash says how its pixels are computed, here too
        except BaseException:
            self._ended.close()
            raise

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()

    def outcomes(self, batches: Sequence[Batch], folder: Path, attention: PromptToPrompt | None) -> Outcomes:
        if not batches:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # a batch that kills every worker it meets ends alone
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        model = {"model": self.args.model, "device": self.device, "dtype": self.ledits.precision}
        model |= {"compile": self.args.compile, **parts(self.args)}
        constructor = (_absolute(model), batches, folder.absolute(), attention, self.args.overwrite)
        waiting = list(range(len(batches)))
        while waiting:
            lost = set(waiting)
            try:
                for row in self._round(waiting, constructor).iter_rows():
                    lost.discard(int(row["batch"]))
                    yield _outcome(row["outcome"])
            except ray.exceptions.RayError as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise RunError(f"Ray gave up: {lines[-1] if lines else type(error).__name__}") from None
            if len(lost) == len(waiting):
                break
            # What was handed to a machine that has left is lost with it; among those that stay it is tried again.
            waiting = sorted(lost)
        for i in waiting:
            jobs = [task.job for task in batches[i].tasks if task.job.line in batches[i].missing]
            yield Outcome([], [Failure.of(job, LOST) for job in jobs])

    def _round(self, numbers: Sequence[int], constructor: tuple[Any, ...]) -> ray.data.Dataset:
        """Those batches, each once, on the workers there is room for now."""
        slots = int(ray.cluster_resources().get("GPU" if "num_gpus" in self.slot else "CPU", 0))
        workers = max(1, min(self.workers, slots, len(numbers)))
        # A block per batch: what is handed out, lost and handed out again is one batch.
        table = ray.data.from_items([{"batch": i} for i in numbers], override_num_blocks=len(numbers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # options of actors go until 2.64; there is no other way to end a retry
            return table.map_batches(
                Worker,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers),
                fn_constructor_args=constructor,
                max_task_retries=RETRIES,
                **self.slot,
            )


def _start(workers: int | None, ended: ExitStack) -> None:
    """Connect to a cluster, or start one; `ended` disconnects, ends it, and removes what it left on the disk."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if not os.environ.get("RAY_ADDRESS"):
        # Ray keeps every session's logs; ours end with the run. The names of its sockets must stay short.
        place = tempfile.mkdtemp(prefix="ledits-ray-", dir="/tmp" if len(tempfile.gettempdir()) > 30 else None)
        ended.callback(shutil.rmtree, place, ignore_errors=True)
        # More slots than cores are fine, if so many workers are asked for.
        slots = max(workers or 0, os.cpu_count() or 1)
        quiet |= {"address": "local", "num_cpus": slots, "include_dashboard": False, "object_store_memory": STORE}
        quiet |= {"_temp_dir": place}
    ended.callback(_shut_down)
    with _signals_kept(), quiet_stderr():
        ray.init(**quiet)


def _shut_down() -> None:
    with _signals_kept():
        ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts handlers of its own in place, one of which prints a trace for SIGTERM; how this command ends is ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _absolute(model: dict[str, Any]) -> dict[str, Any]:
    """The same files by names that hold wherever a worker stands."""

    def name(value: Any) -> Any:
        is_file = isinstance(value, str) and value != "tiny" and os.path.exists(value)
        return os.path.abspath(value) if is_file else value

    files = ("model", "vae", "text_encoder", "tokenizer")
    lora = [(name(path), scale) for path, scale in model["lora"]]
    return {**model, **{key: name(model[key]) for key in files}, "lora": lora}


class Worker:
    """An actor: loads the model once, then does the batches it is handed by their numbers.

    What ends a whole run (a model that does not load, a full disk) is told as a line: Ray would retry an exception.
    """

    def __init__(
        self,
        model: dict[str, Any],
        batches: Sequence[Batch],
        folder: Path,
        attention: PromptToPrompt | None,
        overwrite: bool,
    ) -> None:
        self.batches, self.wrong = batches, ""
        try:
            self.editor = Editor(LEdits.from_pretrained(**model), folder, attention, overwrite)
        except Exception as error:  # noqa: BLE001 - any of them is told below
            self.wrong = one_line(error)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {"batch": rows["batch"], "outcome": [json.dumps(self._told(int(i))) for i in rows["batch"]]}

    def _told(self, number: int) -> dict[str, Any]:
        try:
            outcome = Outcome() if self.wrong else self.editor(self.batches[number])
        except OSError as error:
            outcome, self.wrong = Outcome(), one_line(error)
        return {**asdict(outcome), "wrong": self.wrong}


def _outcome(text: str) -> Outcome:
    told = json.loads(text)
    if told["wrong"]:
        raise RunError(told["wrong"])
    return Outcome(told["done"], [Failure(**failure) for failure in told["failures"]])

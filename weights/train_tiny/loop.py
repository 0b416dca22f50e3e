"""What the training stages share: a step loop that can be stopped, resumed and repeated.

Everything random in a step is drawn from a generator seeded by (seed, step), so a run that was stopped and
resumed sees the same pictures and the same noise as one that was not. Checkpoints are safetensors files that
hold the weights, their running average (EMA) and the moments of AdamW.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Training:
    """How long and how fast a stage learns; the rate is flat, then falls along a cosine from `flat` of the steps on.

    `until` and `minutes` end a run early, to be gone on with later: the rate still follows `steps`.
    """

    steps: int
    rate: float
    warmup: int = 100
    flat: float = 0.6
    floor: float = 0.02
    ema: float = 0.999
    weight_decay: float = 0.01
    save_every: int = 250
    until: int | None = None
    minutes: float | None = None
    device: str = "cpu"

    def rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        fraction = (step / self.steps - self.flat) / (1.0 - self.flat)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
        return self.rate * (self.floor + (1.0 - self.floor) * cosine)


def generator_at(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def ema_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights of a stage's checkpoint, float32, under the module's own names."""
    with safe_open(checkpoint, "pt") as file:
        return {name.removeprefix("ema."): file.get_tensor(name) for name in file.keys() if name.startswith("ema.")}


class State:
    """A module's weights, their running average and the optimiser, as one resumable thing."""

    def __init__(self, module: nn.Module, plan: Training) -> None:
        self.module, self.plan, self.step, self.seconds = module, plan, 0, 0.0
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=plan.rate, betas=BETAS, weight_decay=plan.weight_decay, fused=True
        )
        self.ema = {name: value.detach().clone() for name, value in module.named_parameters()}

    def update(self, loss: Tensor) -> None:
        """One AdamW step on the loss, gradients clipped to norm 1, then the running average."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        self.optimizer.step()
        self.step += 1
        decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))
        values = dict(self.module.named_parameters())
        torch._foreach_lerp_(list(self.ema.values()), [values[name].detach() for name in self.ema], 1.0 - decay)

    def save(self, path: Path) -> None:
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.module.named_parameters():
            tensors[f"weights.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        save_atomically(tensors, path, {"step": str(self.step), "seconds": f"{self.seconds:.1f}"})

    def load(self, path: Path) -> None:
        tensors = load_file(path, device=self.plan.device)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(tensors[f"weights.{name}"])
                self.ema[name].copy_(tensors[f"ema.{name}"])
                self.optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }


def train(
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    plan: Training,
    checkpoint: Path,
    log: Path,
    log_every: int = 50,
) -> State:
    """Minimise `loss_at(step)` up to `plan.until` or `plan.steps`, going on from the checkpoint where there is one.

    After `plan.minutes` it saves and returns, so that a machine lent in short turns can hand the run on to itself. The
    module is moved to `plan.device`; `loss_at` must compute there.
    """
    state = State(module.to(plan.device), plan)
    if checkpoint.exists():
        state.load(checkpoint)
    module.train()
    last = plan.steps if plan.until is None else min(plan.until, plan.steps)
    before, started, losses = state.seconds, time.perf_counter(), list[float]()
    while state.step < last:
        loss = loss_at(state.step)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss at step {state.step} is {loss.item()}; lower the rate")
        losses.append(loss.item())
        state.update(loss)
        state.seconds = before + time.perf_counter() - started
        if state.step % log_every == 0 or state.step == last:
            line = {
                "step": state.step,
                "loss": sum(losses) / len(losses),
                "seconds": round(state.seconds, 1),
                "threads": torch.get_num_threads(),
            }
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            losses.clear()
        out_of_time = plan.minutes is not None and time.perf_counter() - started >= 60.0 * plan.minutes
        if state.step % plan.save_every == 0 or state.step == last or out_of_time:
            state.save(checkpoint)
        if out_of_time:
            break
    module.eval()
    return state

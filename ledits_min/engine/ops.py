"""The one switch between plain torch and the Triton kernels.

LEDITS_KERNELS = auto    Triton for tensors on a CUDA device, torch for all others
                 torch   never Triton
                 triton  always Triton (a CUDA device, or Triton's interpreter with TRITON_INTERPRET=1)

The torch side of every operation calls `sega`, `guidance` and `inversion`; what it computes is what the operation
means. Only the absence of Triton makes `auto` use torch on a GPU: a Triton that is there and fails, raises. The kernels
have no backward, so while autograd records, torch runs; likewise under torch.compile, which makes kernels of its own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ledits_min import inversion
from ledits_min.engine import cpu
from ledits_min.engine.torch_private import is_untouched
from ledits_min.errors import InputError, warn
from ledits_min.guidance import EditSettings, edited_eps, guided_eps, guided_texts
from ledits_min.inversion import InversionSettings, Solver, posterior_mean, second_order_eps
from ledits_min.schedule import Level, sqrt


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors runs as a kernel; InputError where LEDITS_KERNELS cannot be honoured."""
    if torch.compiler.is_compiling():
        return False
    mode = os.environ.get("LEDITS_KERNELS", "auto")
    if mode not in ("auto", "torch", "triton"):
        raise InputError(f"LEDITS_KERNELS is {mode!r}; it must be 'auto', 'torch' or 'triton'")
    device = tensors[0].device.type
    if mode == "torch" or (mode == "auto" and device != "cuda"):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if mode == "auto":
        return has_triton()
    if not has_triton():
        raise InputError("LEDITS_KERNELS is 'triton' but no triton is installed; install it, or use 'auto'")
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(f"LEDITS_KERNELS is 'triton' but the tensors are on {device!r}; use a CUDA device, or 'auto'")
    return True


@cache
def has_triton() -> bool:
    """Whether a triton is installed, broken or not."""
    return importlib.util.find_spec("triton") is not None


def kernel_calls(
    device: torch.device, dtype: torch.dtype, widths: Sequence[int], groups: int, latents: tuple[int, int, int]
) -> list[Callable[[], object]]:
    """`kernels/variants.py`: what has the kernels compiled that an edit needs; none where torch computes."""
    mode = os.environ.get("LEDITS_KERNELS", "auto")
    if device.type != "cuda" or mode not in ("auto", "triton") or not has_triton():
        return []
    from ledits_min.kernels import variants

    return variants.calls(device, dtype, widths, groups, latents)


def _for_cpu(x: Tensor, *layers: nn.Module) -> bool:
    """Whether `cpu` may compute with these layers' weights."""
    return x.device.type == "cpu" and is_untouched(*layers)


# --- the network's layers -------------------------------------------------------------------------------------------


def defers_sums(hidden: Tensor, *layers: nn.Module) -> bool:
    """Whether what is added in front of a norm (a bias, a residual) is left to the norm.

    For `hidden` and what these layers make of it: where kernels run, on a channels-last map or on tokens, and where
    nothing is put on the layers.
    """
    if not use_triton(hidden):  # alone first: on a CPU no time is to be spent here
        return False
    weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
    if not is_untouched(*layers) or any(weight.dtype != hidden.dtype for weight in weights):
        return False
    if not use_triton(hidden, *weights):
        return False
    from ledits_min.kernels import group_norm_silu, layer_norm

    return group_norm_silu.fits(hidden) if hidden.dim() == 4 else layer_norm.fits(hidden)


def group_norm_silu(
    hidden: Tensor, norm: nn.GroupNorm, add: Tensor | None = None, silu: bool = True, skip: Tensor | None = None
) -> Tensor:
    """silu(norm([hidden + add, skip])): hidden (B, C, h, w), add (B, C) or (C,) at every position, skip (B, S, h, w).

    Without `silu` the norm alone. With `add`, hidden may be written over.

    The kernel is for channels-last memory. NCHW stays with torch, whose own kernel is made for it: by this rule under
    `auto`, with a warning where LEDITS_KERNELS=triton asked for a kernel.
    """
    if is_untouched(norm) and use_triton(hidden, norm.weight, norm.bias, *(() if add is None else (add,))):
        from ledits_min.kernels import group_norm_silu as kernel

        if kernel.fits(hidden):
            return kernel.group_norm_silu(hidden, norm, add, silu, skip)
        if os.environ.get("LEDITS_KERNELS") == "triton":
            warn("group_norm_silu: torch takes over, because a map is not channels-last")
    if add is not None:
        hidden = hidden.add_(add.unflatten(-1, (-1, 1, 1)))
    normed: Tensor = norm(hidden if skip is None else torch.cat([hidden, skip], dim=1))
    return F.silu(normed, inplace=True) if silu else normed  # the norm's own result: nobody else has it


def add_group_norm_silu(
    hidden: Tensor,
    norm: nn.GroupNorm,
    residual: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, silu(norm([total, skip]))) with total = hidden + add + residual; the rest as in `group_norm_silu`."""
    if use_triton(hidden, norm.weight):
        from ledits_min.kernels import group_norm_silu as kernel

        return kernel.add_group_norm_silu(hidden, norm, residual, add, silu, skip)
    total = add_maps(hidden, residual, add)
    return total, group_norm_silu(total, norm, silu=silu, skip=skip)


def add_maps(hidden: Tensor, residual: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """hidden + add + residual, (B, C, h, w) and add (C,)."""
    if use_triton(hidden):
        from ledits_min.kernels import group_norm_silu as kernel

        return kernel.add_maps(hidden, residual, add)
    total = hidden if add is None else hidden + add.unflatten(-1, (-1, 1, 1))
    return total if residual is None else total + residual


def add_layer_norm(tokens: Tensor, norm: nn.LayerNorm, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(total, norm(total)) with total = tokens + residual, (..., C)."""
    if use_triton(tokens, norm.weight):
        from ledits_min.kernels import layer_norm as kernel

        return kernel.add_layer_norm(tokens, norm, residual)
    total = tokens if residual is None else tokens + residual
    return total, norm(total)


def geglu(projected: Tensor) -> Tensor:
    """value * gelu(gate) with [value, gate] = projected, (..., 2 * width) -> (..., width); the exact (erf) gelu."""
    if use_triton(projected):
        from ledits_min.kernels import geglu as kernel

        return kernel.geglu(projected)
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, heads, N, d), k and v (B, heads, L, d) -> (B, heads, N, d)."""
    if q.device.type == "cpu" and cpu.serves_attention(q, k, v):
        return cpu.attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def feed_forward(tokens: Tensor, norm: nn.LayerNorm, widen: nn.Linear, narrow: nn.Linear) -> Tensor:
    """tokens + narrow(geglu(widen(norm(tokens)))), tokens (B, N, C)."""
    layers = (norm, widen, narrow)
    if _for_cpu(tokens, *layers) and not use_triton(tokens) and cpu.serves_feed_forward(tokens, *layers):
        return cpu.feed_forward(tokens, *layers)
    return tokens + narrow(geglu(widen(norm(tokens))))


def add_linear(residual: Tensor, tokens: Tensor, layer: nn.Linear) -> Tensor:
    """residual + layer(tokens)."""
    if _for_cpu(tokens, layer) and cpu.fuses(residual, tokens, *layer.parameters()):
        return cpu.add_linear(residual, tokens, layer)
    return residual + layer(tokens)


def conv(hidden: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(hidden), a convolution that keeps the size."""
    if _for_cpu(hidden, layer) and cpu.fuses(hidden, *layer.parameters()):
        return cpu.conv(hidden, layer)
    return layer(hidden)


def add_conv(residual: Tensor, hidden: Tensor, layer: nn.Conv2d) -> Tensor:
    """residual + layer(hidden), a convolution that keeps the size."""
    if _for_cpu(hidden, layer) and cpu.fuses(residual, hidden, *layer.parameters()):
        return cpu.add_conv(residual, hidden, layer)
    return residual + layer(hidden)


def upsample_conv(hidden: Tensor, size: Sequence[int], layer: nn.Conv2d) -> Tensor:
    """layer(hidden), a convolution of 3 x 3, with hidden grown to `size` by nearest neighbours before."""
    if _for_cpu(hidden, layer) and cpu.serves_upsampling(hidden, size, layer):
        return cpu.upsample_conv(hidden, layer)
    return conv(F.interpolate(hidden, size=tuple(size), mode="nearest"), layer)


# --- the inversion --------------------------------------------------------------------------------------------------


def trajectory(x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """`inversion.trajectory`: x_t of every executed step and x_0 behind them, (T + 1, B, C, h, w)."""
    if use_triton(x_0, noise) and x_0.dtype == torch.float32:
        from ledits_min.kernels import trajectory as kernel

        levels = level_table([Level(level, 1.0, 0.0) for level in alpha_bar_t.tolist()], x_0.device)
        return kernel.trajectory(levels, x_0.contiguous(), noise.to(x_0).contiguous())
    return inversion.trajectory(x_0, noise, alpha_bar_t)


def residuals(
    x: Tensor,
    branches: Tensor,
    settings: InversionSettings,
    solver: Solver,
    steps: range,
    table: Tensor | None = None,
) -> Tensor:
    """x_{t-1} - mu_t(x_t, eps_source) of S consecutive steps in one go: none of them waits for another.

    Of second order a step needs pred_x0 of the one before: `solver` remembers the last, and torch computes.

    x (S + 1, B, C, h, w); branches (N, S, B, C, h, w) holds the predictions for the N texts that guide the source:
    `guided_texts("", source, source_guidance_scale)`; returns (S, B, C, h, w). Who has `level_table` of these levels
    on x's device passes it as `table`: making it waits for the device.
    """
    source, scale = settings.source, settings.source_guidance_scale
    if use_triton(x, branches) and x.dtype == torch.float32 and not solver.weights:
        from ledits_min.kernels import trajectory as kernel

        levels = solver.levels[steps.start : steps.stop]
        table = level_table(levels, x.device) if table is None else table
        return kernel.residuals(table, x.contiguous(), branches, scale)
    eps = guided_eps(dict(zip(guided_texts("", source, scale), branches, strict=True)), "", source, scale)
    means = [solver.mean(step, x[i], eps[i]) for i, step in enumerate(steps)]
    return x[1:] - torch.stack(means)


# --- the editing step -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditSteps:
    """The steps of an edit before the first of them: every step's noise level, and what the edit is asked to do.

    weights: of the solver's second-order term, one per step; none for the first order
    """

    levels: Sequence[Level]
    settings: EditSettings
    weights: Sequence[float] = ()

    @property
    def for_kernel(self) -> bool:
        """Whether the kernel knows these masks: SEGA's, everywhere."""
        return self.settings.region is None and all(term.mask == "percentile" for term in self.settings.terms)

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """The same as numbers, one row per step; the columns are those that `kernels/sega_step.py` names."""
        settings, slots, guidance, terms = self.settings, [], [], []
        for step in range(len(self.levels)):
            slot = {text: n for n, text in enumerate(settings.texts(step))}
            guided = guided_texts(settings.negative, settings.target, settings.guidance_scale)
            base, *text = (slot[text] for text in guided)
            live = [term.matters(step, settings.momentum_scale) for term in settings.terms]
            concepts = [slot[t.text] if alive else -1 for t, alive in zip(settings.terms, live, strict=True)]
            slots.append([slot.get(settings.negative, -1), base, *(text or [-1]), *concepts])
            warm, beta = all(term.is_warm(step) for term in settings.terms), settings.momentum_beta
            guidance.append([settings.guidance_scale, settings.momentum_scale, beta, 1.0 - beta, warm])
            terms.append([
                [-t.guidance_scale if t.reverse else t.guidance_scale, t.threshold, t.weight, t.acts(step)]
                for t in settings.terms
            ])  # fmt: skip
        shape = (len(self.levels), len(settings.terms), 4)
        return {
            "slots": torch.tensor(slots, dtype=torch.int32),
            "levels": level_table(self.levels, torch.device("cpu")),
            "guidance": torch.tensor(guidance, dtype=torch.float32),
            "terms": torch.tensor(terms, dtype=torch.float32).reshape(shape),
            "second_order": torch.tensor(self.weights, dtype=torch.float32),
        }


@dataclass(frozen=True)
class EditState:
    """What a step reads and leaves behind; every tensor is changed in place, so that a captured graph can be replayed.

    step      int32 (B, C)            the step to come; one counter per map, so that every program can advance its own
    x_t       float32 (B, C, h, w)
    momentum  float32 (B, C, h, w)    nu
    shares    float32 (T, K, B, C)    share of the map that a concept's mask kept; 0 where it did not act
    counts    int32 (K, B, C, h, w)   in how many steps a concept's mask kept a position; None: not wanted
    pred_x0   float32 (B, C, h, w)    of the step before, for the solver's second order; None: first order
    tables    EditSteps.tables on the device
    """

    step: Tensor
    x_t: Tensor
    momentum: Tensor
    shares: Tensor
    counts: Tensor | None
    pred_x0: Tensor | None
    tables: dict[str, Tensor]

    @property
    def kept(self) -> Tensor:
        """`counts`, which must have been wanted."""
        assert self.counts is not None, "the masks were not wanted"
        return self.counts


def start(steps: EditSteps, x_t: Tensor, masks: bool = True) -> EditState:
    """The state before the first step, on x_t's device."""
    batch, channels = x_t.shape[:2]
    terms, device = len(steps.settings.terms), x_t.device
    return EditState(
        step=torch.zeros(batch, channels, dtype=torch.int32, device=device),
        x_t=x_t.clone(memory_format=torch.contiguous_format),
        momentum=torch.zeros_like(x_t, memory_format=torch.contiguous_format),
        shares=torch.zeros(len(steps.levels), terms, batch, channels, device=device),
        counts=torch.zeros(terms, *x_t.shape, dtype=torch.int32, device=device) if masks else None,
        pred_x0=torch.zeros_like(x_t, memory_format=torch.contiguous_format) if steps.weights else None,
        tables={name: table.to(device) for name, table in steps.tables.items()},
    )


def steps_by_kernel(steps: EditSteps, state: EditState) -> bool:
    """Whether `sega_step` is a kernel's, which reads in the state itself how far the edit is."""
    if not steps.for_kernel or not use_triton(state.x_t) or state.x_t.dtype != torch.float32:
        return False
    from ledits_min.kernels import sega_step as kernel

    return kernel.fits(state.x_t)


def sega_step(
    steps: EditSteps,
    state: EditState,
    branches: Tensor,
    residuals: Tensor,
    step: int | None = None,
    maps: Mapping[str, Tensor] | None = None,
) -> None:
    """One editing step of Algorithm 1: state.x_t becomes x_{t-1}, and all else in `state` moves one step on.

    branches   (N, B, C, h, w): item n is the prediction for text n of `settings.texts(step)`; further items are ignored
    residuals  (T, B, C, h, w)
    step       what state.step holds, where the caller knows it: it saves torch from waiting for the device. The kernel
               reads state.step itself
    maps       the attention maps (B, h', w') of `settings.attending(step)`

    The kernel makes SEGA's masks; for others, and inside a region, torch computes.
    """
    if steps.for_kernel and use_triton(branches, state.x_t) and state.x_t.dtype == torch.float32:
        from ledits_min.kernels import sega_step as kernel

        if kernel.fits(state.x_t):
            carried = [state.momentum] if state.pred_x0 is None else [state.momentum, state.pred_x0]
            kernel.sega_step(
                state.step, state.tables, branches=branches, residuals=residuals, x_t=state.x_t, carried=carried,
                shares=state.shares, counts=state.counts,
            )  # fmt: skip
            return
        if os.environ.get("LEDITS_KERNELS") == "triton":
            warn("sega_step: torch takes over, because a map is too large for registers")

    step = int(state.step[0, 0]) if step is None else step
    texts = steps.settings.texts(step)
    eps = dict(zip(texts, branches[: len(texts)].to(state.x_t.dtype), strict=True))
    guided, added = edited_eps(eps, steps.settings, step, state.momentum, maps or {})
    if added is not None:
        state.momentum.copy_(added.momentum)
        for i, mask in enumerate(added.masks):
            if mask is not None:
                state.shares[step, i] = mask.float().mean(dim=(2, 3))
                if state.counts is not None:
                    state.counts[i] += mask
    level = steps.levels[step]
    if state.pred_x0 is not None:
        guided, pred_x0 = second_order_eps(
            state.x_t, guided, state.pred_x0, level.alpha_bar_t, steps.weights[step]
        )  # fmt: skip
        state.pred_x0.copy_(pred_x0)
    state.x_t.copy_(posterior_mean(state.x_t, guided, *level) + residuals[step])
    state.step.add_(1)


def level_table(levels: Sequence[Level], device: torch.device) -> Tensor:
    """The coefficients of `inversion.noisy_latents` and `inversion.posterior_mean`, rounded once: float32 (T, 4)."""
    rows = [
        [sqrt(level), sqrt(1.0 - level), sqrt(level_prev), sqrt(1.0 - level_prev - sigma_t**2)]
        for level, level_prev, sigma_t in levels
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)

"""`scheduler_config.json`: the noise schedule in it, and a verdict on each of its other keys.

A model was trained on a table of betas; the class named in the file is only a way to step along it, and LEDITS brings
its own: DDIM steps, leading, with noise. So a class without such a table is refused, and of the keys each is used,
harmless because it says how another sampler steps, or refused. Classes and keys are those of diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ledits_min.config import ScheduleConfig
from ledits_min.errors import InputError, short
from ledits_min.files.reader import Reader

# Every class that steps along the betas of DDPM [2006.11239].
_CLASSES = frozenset(
    [
        *("DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
        *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
        *("DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler"),
        *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
        *("KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler"),
        "UniPCMultistepScheduler",
    ]
)
_NEEDED = ("beta_start", "beta_end", "beta_schedule")
# How another sampler steps, with the value that says what we do; None where there is nothing to compare.
_STEPPING: dict[str, Any] = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "thresholding": False,
    "timestep_spacing": "leading",
    **dict.fromkeys(
        [
            *("algorithm_type", "clip_sample_range", "corrector_order", "disable_corrector"),
            *("dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "interpolation_type"),
            *("lambda_min_clipped", "lower_order_final", "noise_sampler_seed", "predict_x0", "predictor_order"),
            *("sample_max_value", "skip_prk_steps", "solver_order", "solver_p", "solver_type", "tensor_format"),
            *("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas"),
        ]
    ),
}  # fmt: skip
# What would make it another schedule, with the values under which it does not; null is always one.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "eta": (0, 0.0),
    "flow_shift": (1, 1.0),
    "rho": (),
    "shift": (1, 1.0),
    "shift_terminal": (),
    "sigma_data": (),
    "sigma_max": (),
    "sigma_min": (),
    "sigma_schedule": (),
    "snr_shift_scale": (),
    "tau_func": (),
    "time_shift_type": ("exponential",),  # of use_dynamic_shifting alone
    "timestep_type": ("discrete",),
    "trained_betas": (),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


def read_schedule(mapping: Mapping[str, Any], source: str) -> ScheduleConfig:
    """The noise schedule of a parsed scheduler config; InputError for one that is no table of betas, or not known."""
    read = Reader(mapping, source, None, {})
    name = mapping.get("_class_name")
    if name is not None and not (isinstance(name, str) and name in _CLASSES):
        raise InputError(
            f"{source}: {short(name)} is no schedule over betas, which Stable Diffusion 1.x, 2.x and XL have; "
            "such a model cannot be inverted here. If this one is of these families, put its own scheduler config there"
        )
    if missing := [key for key in _NEEDED if mapping.get(key) is None]:
        raise InputError(
            f"{source}: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing, and is not guessed; "
            "Stable Diffusion has beta_start 0.00085, beta_end 0.012 and beta_schedule 'scaled_linear'"
        )
    for key, sound in _OTHERS.items():
        value = mapping.get(key)
        if value is not None and not any(value == one and type(value) is type(one) for one in sound):
            raise InputError(f"{source}: {key} = {short(value)} is another noise schedule, which is not supported")
    config = ScheduleConfig(
        num_train_timesteps=read.whole("num_train_timesteps", 1000),
        beta_start=read.number("beta_start", 0.00085),
        beta_end=read.number("beta_end", 0.012),
        beta_schedule=read.string("beta_schedule", "scaled_linear"),
        # diffusers' own pipelines for these models read a missing or other offset as 1.
        steps_offset=read.whole("steps_offset", 1),
        prediction_type=read.string("prediction_type", "epsilon"),
        rescale_betas_zero_snr=read.flag("rescale_betas_zero_snr", False),
    )
    read.honour(_STEPPING, _OTHERS)
    read.refuse_the_rest()
    return config


def schedule_json(config: ScheduleConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """The diffusers-style dictionary that `read_schedule` reads back; `fields` are those of the config."""
    if not config.rescale_betas_zero_snr:
        del fields["rescale_betas_zero_snr"]  # the table as it was before there was a choice
    return {"_class_name": "DDIMScheduler", **fields, "clip_sample": False, "set_alpha_to_one": False}


def unused_settings(mapping: Mapping[str, Any]) -> list[str]:
    """One line on what the file says of steps that are not taken here; none where it says nothing of the kind."""
    told = [
        f"{key} = {short(mapping[key])}"
        for key, ours in _STEPPING.items()
        if ours is not None and mapping.get(key) is not None and mapping[key] != ours
    ]
    if not told:
        return []
    return [f"scheduler: {', '.join(told)} concern another sampler; LEDITS takes leading DDIM steps of its own"]

"""The UNet as the loops see it: it predicts eps. The engine's is asked about texts and timesteps by number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ledits_min.engine.fast_networks import FastUNet
from ledits_min.engine.maps import Recorder
from ledits_min.inversion import eps_from_v
from ledits_min.p2p import AttentionControl, ControlledEpsModel
from ledits_min.schedule import Schedule
from ledits_min.text import Context
from ledits_min.unet import UNet


class Denoiser:
    """eps of every (executed step, text, image) that a run can ask about: a `evaluate.Network`.

    What depends on them alone is made once, here: the texts' keys and values in every cross-attention, the embedded
    timesteps, the noise levels. A call copies nothing from the host; what it reads is in `tensors`, and whoever puts
    others of the same shapes there has them read.
    """

    def __init__(
        self, unet: FastUNet, contexts: Sequence[Context], schedule: Schedule, prediction_type: str, compiled: bool
    ) -> None:
        device = unet.conv_in.weight.device
        self.unet = unet
        self.predicts_v = prediction_type == "v_prediction"
        # Not where the text is part of `time`, which acts from the start, nor where torch.compile would compile once
        # more for every number of x_t.
        self.may_share = unet.add_embedding is None and not compiled
        self.tensors = {"alpha_bar_t": schedule.alpha_bar_t.to(device, torch.float32)}

        # A text at a time, so that what a text is does not depend, to the last bit, on its neighbours.
        projected = [unet.project(context.tokens.to(device)) for context in contexts]
        self.attentions = list(projected[0])
        for n, attention in enumerate(self.attentions):
            for i, name in enumerate(("keys", "values")):
                self.tensors[f"{name} {n}"] = torch.cat([one[attention][i] for one in projected])
        timesteps = schedule.timesteps.to(device)
        # (texts, images, steps, time_width); one row stands for all images where they have no row of their own.
        self.tensors["time"] = torch.stack([
            torch.stack([
                unet.embed(timesteps, None if image is None else image.expand(len(timesteps), -1))
                for image in ([None] if context.added is None else context.added)
            ])
            for context in contexts
        ])  # fmt: skip

    def __call__(
        self, x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor,
        attention: AttentionControl | Recorder | None = None,
    ) -> Tensor:  # fmt: skip
        read = self.tensors
        context = {
            attention: (read[f"keys {n}"][texts], read[f"values {n}"][texts])
            for n, attention in enumerate(self.attentions)
        }
        time = read["time"][texts, images % read["time"].shape[1], steps]
        shares = len(x_t) < len(inputs)
        if shares and not self.may_share:
            x_t, shares = x_t[inputs], False
        rows = inputs if shares else None
        prediction: Tensor = self.unet(x_t, time, context, attention=attention, rows=rows).contiguous()
        if self.predicts_v:
            own = x_t[inputs] if shares else x_t
            return eps_from_v(prediction, own, read["alpha_bar_t"][steps].view(-1, 1, 1, 1))
        return prediction


def plain_eps_model(unet: UNet, schedule: Schedule, prediction_type: str) -> ControlledEpsModel:
    """The UNet as the maths sees it: it predicts eps, in float32, for one text (or several, evenly) and a batch."""
    alphas_cumprod = schedule.alphas_cumprod.to(unet.conv_in.weight.device, torch.float32)

    def eps_model(
        x_t: Tensor,
        t: Tensor,
        context: Context | list[Context],
        attention: AttentionControl | Recorder | None = None,
    ) -> Tensor:
        contexts = context if isinstance(context, list) else [context]
        batch = len(x_t) // len(contexts)
        tokens = torch.cat([one.tokens.expand(batch, -1, -1) for one in contexts])
        rows = [one.added.expand(batch, -1) for one in contexts if one.added is not None]
        prediction: Tensor = unet(x_t, t, tokens, torch.cat(rows) if rows else None, attention)
        if prediction_type == "v_prediction":
            return eps_from_v(prediction, x_t, alphas_cumprod[t].view(-1, 1, 1, 1))
        return prediction

    return eps_model

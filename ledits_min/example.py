"""A whole edit from pixels to pixels with the core alone: read it from top to bottom beside LEDITS, Algorithm 1.

    python -m ledits_min.example [PICTURE [CONCEPT [OUTPUT]]]

With no arguments it adds sunglasses to a sample portrait by the embedded model.
The reconstruction, the same edit with nothing asked for, must come back as well as the autoencoder can: 33.2 dB here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ledits_min.edit import edit, invert
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings, draw_noise
from ledits_min.sega import ConceptTerm
from ledits_min.text import TextEncoder, build_text_model
from ledits_min.unet import UNet
from ledits_min.vae import VAE
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.tokenizer import load_tokenizer

SAMPLE = Path(__file__).parent / "weights/tiny/samples/portrait1.png"


@torch.no_grad()
def main(picture: str = str(SAMPLE), concept: str = "sunglasses", output: str = "example.png") -> float:
    # The networks: plain modules that take a checkpoint's weights by name.
    checkpoint = load_checkpoint("tiny", dtype=torch.float32)
    unet, vae, clip = UNet(checkpoint.unet_config), VAE(checkpoint.vae_config), build_text_model(checkpoint.text_config)
    for network, weights in ((unet, checkpoint.unet), (vae, checkpoint.vae), (clip, checkpoint.text)):
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    text = TextEncoder(load_tokenizer(checkpoint.tokenizer, checkpoint.text_config), clip)

    # The picture as latents x_0, the texts as contexts, the UNet as a callable that predicts noise.
    side = checkpoint.unet_config.sample_size * checkpoint.vae_config.factor
    image = to_tensor(Image.open(picture).convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
    x_0 = vae.encode(image)
    contexts = {one: text.encode([one]).tokens for one in ("", concept)}

    def eps_model(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(x_t, t, context.expand(len(x_t), -1, -1))

    # Invert: the noisy start x_T, and the residual of every step that leads back from it to the picture.
    inversion = InversionSettings(schedule=checkpoint.schedule_config, num_steps=25, skip=4)
    noise = draw_noise([0], inversion.executed_steps, tuple(x_0.shape[1:]))
    x_T, residuals = invert(eps_model, contexts, x_0, noise, inversion)

    # Edit: the same way back, guided by nothing, then by a concept.
    wanted = ConceptTerm(
        concept, guidance_scale=2.0, threshold=0.9, warmup_steps=1, cooldown_steps=None, weight=1.0, reverse=False
    )
    reconstruction = vae.decode(edit(eps_model, contexts, x_T, residuals, inversion, EditSettings()))
    edited = vae.decode(edit(eps_model, contexts, x_T, residuals, inversion, EditSettings(concepts=(wanted,))))

    to_image(edited).save(output)
    psnr = 10.0 * float(torch.log10(4.0 / (reconstruction.clamp(-1.0, 1.0) - image).square().mean()))
    print(f"{output}: {concept!r} added; reconstruction {psnr:.1f} dB, with the sample portrait 33.2 is expected")
    return psnr


def to_tensor(image: Image.Image) -> Tensor:
    """RGB pixels -> float32 (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1.0


def to_image(image: Tensor) -> Image.Image:
    """The first of (B, 3, H, W) in [-1, 1] -> RGB pixels."""
    pixels = (image[0].clamp(-1.0, 1.0) + 1.0) * 127.5
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])

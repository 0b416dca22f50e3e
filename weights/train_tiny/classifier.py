"""The attribute oracle: a small convolutional network that says what a portrait shows. It scores, it never trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ledits_min.weights.train_tiny.loop import State, Training, ema_weights, train
from ledits_min.weights.train_tiny.portraits import ATTRIBUTES, Pixels, labels, load_split
from ledits_min.weights.train_tiny.vae import batch_at, to_image

BATCH = 64
SIDE = 64
ORACLE = "oracle.safetensors"  # in the exported model's folder
PLAN = Training(steps=1500, rate=2e-3, flat=0.4, ema=0.99)


class Classifier(nn.Module):
    """Logits (B, values) for each attribute of ATTRIBUTES, from images (B, 3, H, W) in [-1, 1].

    It looks at area averages of SIDE x SIDE, whatever the size: attributes are larger than a pixel.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (24, 48, 96, 128):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(128), nn.SiLU())
        self.features(torch.zeros(1, 3, SIDE, SIDE))
        self.heads = nn.ModuleList(nn.Linear(128, len(values)) for values in ATTRIBUTES.values())

    def forward(self, image: Tensor) -> list[Tensor]:
        feature = self.features(shrink(image))
        return [head(feature) for head in self.heads]


def shrink(image: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(image, SIDE)


def soften(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and noise of random strength, so that an autoencoder's softness does not mislead the oracle."""
    strength = torch.rand(len(image), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = 0.1 * torch.rand(len(image), 1, 1, 1, generator=generator) * torch.randn(image.shape, generator=generator)
    return torch.lerp(image, blurred, strength) + noise


def seeing_loss(classifier: Classifier, image: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropy over the attributes; -1, an attribute that cannot be seen, does not count."""
    pairs = zip(classifier(image), truth.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(logits, target, ignore_index=-1) for logits, target in pairs]).mean()


def train_classifier(run: Path, seed: int, plan: Training = PLAN) -> State:
    torch.manual_seed(seed)
    classifier = Classifier()
    pixels, shown = load_split(run / "data", "train")
    truth = torch.from_numpy(labels(shown))

    def loss_at(step: int) -> Tensor:
        image, index, generator = batch_at(pixels, seed, step, BATCH)
        seen = soften(shrink(image), generator)
        return seeing_loss(classifier, seen.to(plan.device), truth[index].to(plan.device))

    return train(classifier, loss_at, plan, run / "classifier.safetensors", run / "classifier.jsonl")


def load_classifier(run: Path) -> Classifier:
    classifier = Classifier()
    classifier.load_state_dict(ema_weights(run / "classifier.safetensors"), strict=True)
    return classifier.eval().requires_grad_(False)


def load_oracle(model: Path) -> Classifier:
    """The classifier that stands beside an exported model."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(model / ORACLE), strict=True)
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def see(classifier: Classifier, pixels: Pixels) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Class numbers (N, attributes) that the oracle sees in uint8 pictures (N, H, W, 3)."""
    parts = [
        torch.stack([logits.argmax(dim=1) for logits in classifier(to_image(part))], dim=1)
        for part in np.array_split(pixels, max(1, len(pixels) // 250))
    ]
    seen: np.ndarray[tuple[int, int], np.dtype[np.int64]] = torch.cat(parts).numpy()
    return seen


def accuracy(classifier: Classifier, pixels: Pixels, shown: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of the pictures that show an attribute where the oracle sees it right, by attribute."""
    truth = labels(shown)
    right = see(classifier, pixels) == truth
    return {name: float(right[truth[:, i] >= 0, i].mean()) for i, name in enumerate(ATTRIBUTES)}

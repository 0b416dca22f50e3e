"""What an edit is worth in numbers: fidelity where nothing was asked, nearness to the ideal, intervals, monotonicity.

Pictures are uint8 (N, H, W, 3), regions bool (N, H, W); a score holds one number per picture, NaN where one has no
such place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ledits_min.weights.train_tiny.portraits import Pixels

Region = NDArray[np.bool_]
Numbers = NDArray[np.float64]

LEVEL = 8  # of 255: a difference up to this is the renderer's antialiasing, not a change
CEILING = 60.0  # dB; a single level off in half the pixels is some 51
RESAMPLES = 2000


def changed_region(before: Pixels, ideal: Pixels) -> Region:
    """Where the ideal edit changes the picture, and a 32nd of its side around that: half a latent pixel at factor 8."""
    margin = before.shape[1] // 32
    changed = np.abs(before.astype(np.int16) - ideal.astype(np.int16)).max(axis=-1) > LEVEL
    grown = F.max_pool2d(torch.from_numpy(changed).float()[:, None], 2 * margin + 1, stride=1, padding=margin)
    region: Region = grown[:, 0].numpy() > 0.0
    return region


def mean_where(values: NDArray[Any], where: Region) -> Numbers:
    """Mean of values (N, H, W) over each picture's region."""
    count = where.sum(axis=(1, 2)).astype(np.float64)
    total = np.where(where, values, 0.0).sum(axis=(1, 2))
    means: Numbers = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return means


def psnr_each(a: Pixels, b: Pixels, where: Region | None = None) -> Numbers:
    """10 log10(255^2 / mean squared difference) of each pair, at most CEILING dB."""
    squared = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=-1)
    error = mean_where(squared, np.ones(squared.shape, dtype=bool) if where is None else where)
    return np.asarray(10.0 * np.log10(255.0**2 / np.maximum(error, 255.0**2 / 10.0 ** (CEILING / 10.0))))


def ssim_each(a: Pixels, b: Pixels, where: Region) -> Numbers:
    """The mean of the structural similarity map [Wang et al. 2004, Gaussian window] over each picture's region."""
    from skimage.metrics import structural_similarity

    maps = [
        structural_similarity(x, y, channel_axis=-1, full=True, gaussian_weights=True, sigma=1.5)[1].mean(axis=-1)
        for x, y in zip(a, b, strict=True)
    ]
    return mean_where(np.stack(maps), where)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate [Wilson 1927]."""
    from scipy.stats import binomtest

    low, high = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def mean_of(values: NDArray[Any], axis: int = -1) -> Any:
    """The mean of what is a number; NaN where nothing is."""
    known = np.isfinite(values)
    count, total = known.sum(axis=axis), np.where(known, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0)[()]


def bootstrap(values: NDArray[Any], statistic: Callable[[NDArray[Any]], Any] = mean_of) -> tuple[float, float]:
    """The 95 % percentile interval over resampled pictures: the statistic maps (RESAMPLES, N, ...) to (RESAMPLES,)."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    drawn = statistic(values[picks])
    low, high = np.nanquantile(drawn, (0.025, 0.975)) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return float(low), float(high)


def rank_correlation(sweep: Sequence[float], scores: NDArray[Any]) -> Numbers:
    """Spearman's rho between a swept setting (S,) and each picture's scores (N, S); NaN where all scores are equal."""
    from scipy.stats import spearmanr

    constant = np.ptp(scores, axis=1) == 0.0
    return np.array([np.nan if c else spearmanr(sweep, row).statistic for row, c in zip(scores, constant, strict=True)])


def log_probability(logits: Sequence[Tensor], accepted: Sequence[Sequence[int]]) -> Numbers:
    """log p (N,) that every attribute has one of its accepted values, exact where p rounds to 1.

    log p = - sum over attributes of log(1 + exp(-odds)),  odds = logsumexp(accepted) - logsumexp(the other values)
    """
    total = torch.zeros(len(logits[0]), dtype=torch.float64)
    for values, good in zip(logits, accepted, strict=True):
        bad = [index for index in range(values.shape[1]) if index not in good]
        odds = values.double()[:, list(good)].logsumexp(dim=1) - values.double()[:, bad].logsumexp(dim=1)
        total -= F.softplus(-odds, threshold=1e9)
    return total.numpy()


def at_equal(fidelity: Sequence[float], compliance: Sequence[float], wanted: float) -> float | None:
    """The best compliance that a method's points reach at the wanted fidelity, or None where they never do.

    A point serves every fidelity below its own, and between two points a method may be anywhere on the line.
    """
    points = sorted(zip(fidelity, compliance, strict=True))
    above = [success for level, success in points if level >= wanted]
    below = [(level, success) for level, success in points if level < wanted]
    if not above:
        return None
    lines = [
        low[1] + (high[1] - low[1]) * (wanted - low[0]) / (high[0] - low[0])
        for low in below
        for high in points
        if high[0] >= wanted
    ]
    return max(above + lines)

"""Where a concept acts: LEDITS++'s masks against their definition, and the faults of public implementations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.config import MASKS, EditDefaults
from ledits_min.engine.maps import Recorder
from ledits_min.errors import InputError
from ledits_min.guidance import EditSettings, edited_eps
from ledits_min.p2p import attention_maps
from ledits_min.sega import Concept, ConceptTerm, Where, attention_mask, concept_mask, percentile_mask

SIZE = torch.Size([12, 8])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def term(mask: str, threshold: float = 0.8) -> ConceptTerm:
    return Concept("hat", threshold=threshold, warmup_steps=0, mask=mask).resolve(EditDefaults())


def attention(seed: int = 1, batch: int = 2) -> Tensor:
    return normal(batch, 6, 4, seed=seed).abs()


class TestNoise:
    def test_one_map_per_picture_for_all_channels(self) -> None:
        psi = normal(2, 4, *SIZE)
        mask = concept_mask(psi, term("noise"), Where())
        for picture, of in zip(psi, mask, strict=True):
            magnitude = picture.abs().sum(dim=0)
            cut = torch.quantile(magnitude.flatten(), 0.8)
            assert torch.equal(of, (magnitude >= cut).expand(4, *SIZE))

    def test_ties_are_kept_and_a_constant_map_keeps_everything(self) -> None:
        assert concept_mask(torch.full((1, 4, *SIZE), 0.3), term("noise"), Where()).all()

    @pytest.mark.parametrize("channels", [1, 4, 16])
    def test_any_number_of_channels(self, channels: int) -> None:
        """Four are written into public code."""
        mask = concept_mask(normal(1, channels, *SIZE), term("noise"), Where())
        assert mask.shape == (1, channels, *SIZE) and mask[:, 0].sum() == 20  # of 96


class TestAttention:
    def test_smoothed_cut_and_grown(self) -> None:
        maps = attention()
        weights = torch.tensor([[math.exp(-(dx**2 + dy**2)) for dx in (-1, 0, 1)] for dy in (-1, 0, 1)])
        padded = F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
        smooth = F.conv2d(padded, (weights / weights.sum())[None, None])
        kept = smooth >= torch.stack([torch.quantile(one.flatten(), 0.8) for one in smooth])[:, None, None, None]
        found = attention_mask(maps, 0.8, SIZE)
        assert torch.equal(found, kept.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))

    @pytest.mark.parametrize("size", [(12, 8), (13, 7), (64, 40)])
    def test_any_size_of_latents(self, size: tuple[int, int]) -> None:
        assert attention_mask(attention(), 0.8, torch.Size(size)).shape == (2, 1, *size)

    @pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1)])
    def test_a_map_too_small_to_reflect(self, size: tuple[int, int]) -> None:
        assert attention_mask(normal(1, *size).abs(), 0.5, torch.Size([4, 6])).any()

    def test_both_is_where_both_are_and_may_be_nowhere(self) -> None:
        psi, where = normal(2, 4, *SIZE), Where({"hat": attention()})
        both = concept_mask(psi, term("both"), where)
        noise, words = (concept_mask(psi, term(mask), where) for mask in ("noise", "attention"))
        assert torch.equal(both, noise & words) and 0 < both.sum() < min(noise.sum(), words.sum())
        apart, peak = torch.zeros(1, 4, *SIZE), torch.zeros(1, 6, 4)
        apart[..., 0, 0], peak[..., 5, 3] = 1.0, 1.0
        assert not concept_mask(apart, term("both", 0.99), Where({"hat": peak})).any()

    def test_a_picture_of_a_batch_is_as_alone(self) -> None:
        psi, maps = normal(3, 4, *SIZE), attention(batch=3)
        for mask in ("noise", "attention", "both"):
            together = concept_mask(psi, term(mask), Where({"hat": maps}))
            alone = [concept_mask(psi[i : i + 1], term(mask), Where({"hat": maps[i : i + 1]})) for i in range(3)]
            assert torch.equal(together, torch.cat(alone))


class TestRecorder:
    """The maps of a call's own words, and attention as it would be without anybody looking."""

    def heads(self, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """q over 24 pixels, k and v over 7 tokens."""
        return normal(4, heads, 24, 8), normal(4, heads, 7, 8, seed=1), normal(4, heads, 7, 8, seed=2)

    def recorder(self, words: Sequence[int] = (1, 3)) -> Recorder:
        """Of two rows, one with so many words and one with so many."""
        place = torch.arange(7)
        tokens = torch.stack([(place > 0) & (place <= count) for count in words])
        return Recorder(torch.tensor([1, 3]), tokens, frozenset([0, 2]))

    def test_changes_nothing(self) -> None:
        q, k, v = self.heads()
        assert torch.equal(self.recorder().cross_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
        assert torch.equal(self.recorder().self_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))

    def test_sums_the_own_words_of_its_rows_and_averages_heads_and_layers(self) -> None:
        recorder, seen = self.recorder(), []
        for layer in range(4):
            q, k, v = self.heads(heads=2 + layer)
            recorder.cross_attention(q, k, v)
            if layer in (0, 2):
                seen.append(attention_maps(q, k))
        rows = [torch.cat([maps[row, :, :, 1 : 1 + words].sum(-1) for maps in seen]) for row, words in ((1, 1), (3, 3))]
        torch.testing.assert_close(recorder.maps((4, 6)), torch.stack([row.mean(0).view(4, 6) for row in rows]))

    def test_only_the_rows_and_layers_that_are_used_are_materialised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []

        def count(q: Tensor, k: Tensor) -> Tensor:
            made.append(len(q))
            return attention_maps(q, k)

        monkeypatch.setattr("ledits_min.engine.maps.attention_maps", count)
        recorder = self.recorder()
        for _ in range(5):
            recorder.cross_attention(*self.heads())
            recorder.self_attention(*self.heads())
        assert made == [2, 2]

    def test_begin_end_and_padding_do_not_count(self) -> None:
        """A padded length taken for the number of words would sum them all."""
        q, k, v = self.heads()
        other = k.clone()
        one, two = self.recorder([1, 1]), self.recorder([1, 1])
        one.cross_attention(q, k, v)
        other[:, :, [0, 2, 3, 4, 5, 6]] = k[:, :, [3, 0, 5, 2, 6, 4]]  # the same keys elsewhere: the softmax stays
        two.cross_attention(q, other, v)
        torch.testing.assert_close(one.maps((4, 6)), two.maps((4, 6)))
        padded = self.recorder([6, 6])
        padded.cross_attention(q, k, v)
        assert (padded.maps((4, 6)) - one.maps((4, 6))).abs().max() > 0.1

    def test_half_precision_is_looked_at_in_float32(self) -> None:
        recorder = self.recorder()
        recorder.cross_attention(*(each.half() for each in self.heads()))
        assert recorder.maps((4, 6)).dtype == torch.float32


class TestRegion:
    """A user's mask: the quantile is taken inside it."""

    def region(self, rows: int, columns: int) -> Tensor:
        region = torch.zeros(1, 1, *SIZE)
        region[..., :rows, :columns] = 1.0
        return region

    @pytest.mark.parametrize("mask", ["percentile", "noise", "attention", "both"])
    def test_nothing_outside_and_the_share_of_the_inside(self, mask: str) -> None:
        psi, region = normal(2, 4, *SIZE), self.region(6, 4)
        kept = concept_mask(psi, term(mask, 0.75), Where({"hat": attention()}, region))
        assert not (kept & (region == 0.0)).any()
        if mask != "both":
            assert 0.2 <= kept.float().sum() / (2 * 4 * 24) <= 0.4

    def test_a_small_one_still_chooses(self) -> None:
        """5 % of the picture at threshold 0.9: multiplied in before the quantile, the cut would be 0 everywhere."""
        psi, region = normal(1, 4, 20, 20), torch.zeros(1, 1, 20, 20)
        region[..., :5, :4] = 1.0
        faulty = percentile_mask((psi * region).abs().sum(1, keepdim=True), 0.9)
        assert faulty.all()
        assert concept_mask(psi, term("noise", 0.9), Where(region=region))[0, 0].sum() == 2

    def test_one_per_picture(self) -> None:
        psi, regions = normal(2, 4, *SIZE), torch.cat([self.region(6, 4), self.region(2, 8)])
        together = concept_mask(psi, term("noise"), Where(region=regions))
        alone = [concept_mask(psi[i : i + 1], term("noise"), Where(region=regions[i : i + 1])) for i in range(2)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("mask", ["words", "", "Both", 3, True])
def test_a_mask_that_is_none_is_refused(mask: Any) -> None:
    with pytest.raises(InputError, match=r"mask is .*; the choices are percentile, noise, attention, both"):
        Concept("hat", mask=mask)


def test_the_default_is_the_checkpoints() -> None:
    assert Concept("hat").resolve(EditDefaults()).mask == "percentile"
    assert Concept("hat").resolve(replace(EditDefaults(), mask="both")).mask == "both"
    assert Concept("hat", mask="noise").resolve(replace(EditDefaults(), mask="both")).mask == "noise"


@pytest.mark.parametrize("mask", MASKS)
def test_concepts_add_up(mask: str) -> None:
    """What a list of concepts adds is the sum of what each adds alone, where its own mask lets it."""
    eps = {text: normal(2, 4, *SIZE, seed=seed) for seed, text in enumerate(("", "hat", "beard"))}
    maps = {"hat": attention(1), "beard": attention(2)}

    def added(*texts: str) -> Tensor:
        settings = EditSettings(concepts=tuple(replace(term(mask), text=text) for text in texts))
        _, guidance = edited_eps(eps, settings, 0, torch.zeros(2, 4, *SIZE), maps)
        assert guidance is not None
        return guidance.gamma

    hat, beard = added("hat"), added("beard")
    torch.testing.assert_close(added("hat", "beard"), hat + beard)
    assert hat.count_nonzero() and beard.count_nonzero() and not torch.equal(hat, beard)

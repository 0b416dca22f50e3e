"""The text encoder's training, before the diffusion starts: it must say what a caption tells.

Trained together with the diffusion from scratch, every prompt collapses to nearly the same vector and guidance
does nothing; so each attribute (or "not mentioned") is first predicted from the end token and from a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from ledits_min.config import TextConfig
from ledits_min.text import build_text_model
from ledits_min.weights.train_tiny.loop import State, Training, ema_weights, train
from ledits_min.weights.train_tiny.portraits import ATTRIBUTES, caption, labels, sample_portrait, vocabulary

LENGTH = 40
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
BATCH = 64
PLAN = Training(steps=800, rate=1e-3, flat=0.5, ema=0.99)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower case, punctuation ignored; <bos> words <eos>, padded to LENGTH with <pad>."""
    words = {word: index for index, word in enumerate((PAD, BOS, EOS, UNKNOWN, *vocabulary()))}
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = Normalizers([Lowercase(), Replace(Regex(r"[.,;:!?()\"'-]"), " ")])
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, words[BOS]), (EOS, words[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=LENGTH,
    )


def text_config(tokenizer: PreTrainedTokenizerFast) -> TextConfig:
    ids = tokenizer.get_vocab()
    return TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """int64 (N, LENGTH); what is longer loses its last words, never its end token."""
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


class Reader(nn.Module):
    """The text encoder with one linear classifier an attribute; class 0 stands for "not mentioned"."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.encoder = build_text_model(config)
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, 1 + len(values)) for values in ATTRIBUTES.values())
        # Words must start far apart and positions near each other, or all prompts look alike for long.
        embeddings = self.encoder.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.1)

    def forward(self, ids: Tensor, positions: Tensor) -> list[Tensor]:
        """Logits (P, N, 1 + values) an attribute, read at P positions (P, N) of each of N texts."""
        hidden = self.encoder(input_ids=ids).last_hidden_state
        features = hidden[torch.arange(len(ids), device=ids.device), positions]
        return [head(features) for head in self.heads]


def captions_at(seed: str, count: int) -> tuple[list[str], Tensor]:
    """`count` captions of as many portraits, and what they tell: class numbers from 1, 0 for "not mentioned"."""
    rng = Random(seed)
    pairs = [caption(sample_portrait(f"{seed} {index}"), rng) for index in range(count)]
    return [text for text, _ in pairs], torch.from_numpy(labels([told for _, told in pairs])) + 1


def reading_positions(ids: Tensor, eos: int, generator: torch.Generator) -> Tensor:
    """int64 (2, N): each text's end token, and one random token from there on."""
    ends = (ids == eos).int().argmax(dim=1)
    return torch.stack([ends, ends + (torch.rand(len(ids), generator=generator) * (ids.shape[1] - ends)).long()])


def reading_loss(reader: Reader, ids: Tensor, positions: Tensor, told: Tensor) -> Tensor:
    """Mean cross-entropy over the attributes, read at each of the positions (2, N)."""
    read = reader(ids, positions)
    losses = [F.cross_entropy(logits.flatten(0, 1), told[:, i].repeat(2)) for i, logits in enumerate(read)]
    return torch.stack(losses).mean()


def train_text(run: Path, seed: int, plan: Training = PLAN) -> State:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = text_config(tokenizer)
    reader = Reader(config)

    def loss_at(step: int) -> Tensor:
        texts, told = captions_at(f"text {seed} {step}", BATCH)
        generator = torch.Generator().manual_seed(step)
        ids = tokenize(tokenizer, texts)
        positions = reading_positions(ids, config.eos_token_id, generator)
        return reading_loss(reader, ids.to(plan.device), positions.to(plan.device), told.to(plan.device))

    return train(reader, loss_at, plan, run / "text.safetensors", run / "text.jsonl")


def load_text(run: Path) -> tuple[PreTrainedTokenizerFast, CLIPTextModel]:
    """The tokenizer and the averaged encoder of a run, in evaluation mode."""
    tokenizer = build_tokenizer()
    reader = Reader(text_config(tokenizer))
    reader.load_state_dict(ema_weights(run / "text.safetensors"), strict=True)
    encoder: CLIPTextModel = reader.encoder.eval().requires_grad_(False)
    return tokenizer, encoder


@torch.no_grad()
def reading_accuracy(run: Path, count: int = 1000) -> float:
    """Share of attributes of unseen captions that are read right at the end token."""
    tokenizer = build_tokenizer()
    config = text_config(tokenizer)
    reader = Reader(config)
    reader.load_state_dict(ema_weights(run / "text.safetensors"), strict=True)
    texts, told = captions_at("unseen captions", count)
    ids = tokenize(tokenizer, texts)
    ends = (ids == config.eos_token_id).int().argmax(dim=1)
    read = torch.stack([logits[0].argmax(dim=1) for logits in reader.eval()(ids, ends[None])], dim=1)
    return float((read == told).double().mean())

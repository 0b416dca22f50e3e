"""Prompts to embeddings: CLIP's tokenizer and text model, as transformers implements them, loaded offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import CLIPTextConfig, CLIPTextModel

from ledits_min.config import TextConfig
from ledits_min.weights.tokenizer import check_vocabulary, check_words


@dataclass(frozen=True)
class Context:
    """What the UNet is given of N texts, float32.

    tokens  (N, L, D), what the cross-attentions read
    added   (N, A), what is embedded beside the timestep; None where the family has no such thing. Of a single
            text it may have one row per image (SDXL: the sizes of each picture)
    own     how many tokens of each text are its own; they stand behind the begin token
    """

    tokens: Tensor
    added: Tensor | None = None
    own: tuple[int, ...] = ()

    def with_features(self, features: Tensor) -> Context:
        """With more features (B, F) behind what is embedded beside the timestep, added (1, A) -> (B, A + F)."""
        if self.added is None:
            return replace(self, added=features)
        return replace(self, added=torch.cat([self.added.expand(len(features), -1), features], dim=1))


class TextEncoder:
    """Prompts -> hidden states of a text model, the context, and the pooled text where the model has a projection.

    SD 1.x and 2.x read the last layer behind the final LayerNorm, SDXL the one before it as it is (`penultimate`), or
    one that is still earlier by `skipped_layers`. The pooled text is the last layer's state at the end token, behind
    LayerNorm and projection, in either case.
    Padding tokens are attended to, as in the published models: no attention mask is passed.
    """

    def __init__(
        self, tokenizer: Any, model: CLIPTextModel, penultimate: bool = False, skipped_layers: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.penultimate, self.skipped_layers = penultimate, skipped_layers
        self.length = int(model.config.max_position_embeddings)
        check_vocabulary(tokenizer, int(model.config.vocab_size or 0))

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return sum(weight.nbytes for weight in self.model.parameters())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        nn.Module.to(self.model, device=device, dtype=dtype)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Context:
        """Context of N prompts: tokens (N, L, D) with L the model's full length, added (N, P) the pooled text.

        A prompt that is too long is cut, with a warning that names the dropped words. A word-level tokenizer refuses
        words it does not know with an InputError that lists those it does.
        """
        for prompt in prompts:
            self.check(prompt)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        output = self.model(tokens.input_ids.to(self.model.device), output_hidden_states=self.penultimate)
        states = output.hidden_states[-2 - self.skipped_layers] if self.penultimate else output.last_hidden_state
        projection = getattr(self.model, "text_projection", None)
        pooled = None if projection is None else projection(output.pooler_output).float()
        own = tuple(sum(map(len, self.words(prompt))) for prompt in prompts)  # an encoding's length counts the padding
        return Context(states.float(), pooled, own)

    def words(self, prompt: str) -> list[tuple[int, ...]]:
        """The token ids of each word of a prompt, those cut off left out; a punctuation mark counts as a word."""
        found = self.tokenizer(prompt, truncation=True, max_length=self.length)
        words: dict[int, list[int]] = {}
        for token, word in zip(found.input_ids, found.word_ids(), strict=True):
            if word is not None:  # None: begin token, end token
                words.setdefault(word, []).append(token)
        return [tuple(tokens) for tokens in words.values()]

    def check(self, prompt: str) -> None:
        """Warn of words that do not fit; InputError for words that a word-level tokenizer does not know."""
        check_words(self.tokenizer, prompt, self.length - 2)  # without the begin and the end token


class TextEncoderPair:
    """SDXL's two text encoders as one: tokens side by side along D, the second one's pooled text.

    zeros_for_empty  the empty prompt is zeros in place of its embeddings, as SDXL base was trained
    """

    def __init__(self, first: TextEncoder, second: TextEncoder, zeros_for_empty: bool) -> None:
        self.first, self.second, self.zeros_for_empty = first, second, zeros_for_empty
        self.tokenizer, self.length = first.tokenizer, first.length

    @property
    def weights(self) -> int:
        return self.first.weights + self.second.weights

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.first.to(device, dtype)
        self.second.to(device, dtype)

    def encode(self, prompts: Sequence[str]) -> Context:
        """As `TextEncoder.encode`, D being the sum of both widths."""
        one, two = self.first.encode(prompts), self.second.encode(prompts)
        assert two.added is not None, "the second text encoder pools"
        tokens, pooled = torch.cat([one.tokens, two.tokens], dim=-1), two.added
        if self.zeros_for_empty:
            said = torch.tensor([[bool(prompt)] for prompt in prompts], device=tokens.device)
            tokens, pooled = tokens * said[..., None], pooled * said
        return Context(tokens, pooled, one.own)

    def words(self, prompt: str) -> list[tuple[int, ...]]:
        return self.first.words(prompt)

    def check(self, prompt: str) -> None:
        self.first.check(prompt)


def build_text_model(config: TextConfig) -> CLIPTextModel:
    """The text model with uninitialised or random weights; under `torch.device("meta")` its parameters are shapes."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    settings = {name: getattr(config, name) for name in (*names, *more, "projection_dim")}
    model = CLIPTextModel(CLIPTextConfig(**settings))
    if config.projection_dim:
        model.text_projection = torch.nn.Linear(config.hidden_size, config.projection_dim, bias=False)
    # Not a weight: checkpoints lack it or bring a damaged copy, and a meta buffer would have no numbers at all.
    positions = torch.arange(config.max_position_embeddings, device="cpu")[None]
    model.embeddings.position_ids = torch.nn.Buffer(positions, persistent=False)
    model.eval()
    return model

"""Prompts to embeddings: CLIP's tokenizer and text model, as transformers implements them, loaded without a network."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from ledits_min.config import InputError, TextConfig
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class TextEncoder:
    """Prompts -> the text model's last hidden states behind its final LayerNorm, what SD 1.x calls the context.

    Padding tokens are attended to, as in the published models: no attention mask is passed.
    """

    def __init__(self, tokenizer: Any, model: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.length = int(model.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Context of each prompt, float32 (N, L, D), L the model's full length.

        A prompt that is too long is cut, with a warning that names the dropped words. A word-level tokenizer refuses
        words it does not know with an InputError that lists those it does.
        """
        for prompt in prompts:
            self.check(prompt)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        states = self.model(tokens.input_ids.to(self.model.device)).last_hidden_state
        return torch.as_tensor(states).float()

    def check(self, prompt: str) -> None:
        """Warn of words that do not fit; refuse words that a word-level tokenizer does not know."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        unknown = self.tokenizer.unk_token_id
        if unknown in ids and unknown != self.tokenizer.eos_token_id:  # CLIP's own byte-level one knows every word
            backend, vocabulary = self.tokenizer.backend_tokenizer, self.tokenizer.get_vocab()
            plain = backend.normalizer.normalize_str(prompt) if backend.normalizer else prompt
            words = backend.pre_tokenizer.pre_tokenize_str(plain)
            strange = ", ".join(word for word, _ in words if word not in vocabulary)
            known = ", ".join(sorted(word for word in vocabulary if word not in self.tokenizer.all_special_tokens))
            raise InputError(f"prompt {prompt!r}: this model does not know {strange!r}; it knows: {known}")
        room = self.length - 2  # begin and end tokens
        if len(ids) > room:
            dropped = self.tokenizer.decode(ids[room:])
            warnings.warn(
                f"the prompt is {len(ids)} tokens long and the model reads {room}; dropped: {dropped!r}", stacklevel=3
            )


def build_text_model(config: TextConfig) -> CLIPTextModel:
    """The text model with uninitialised or random weights; under `torch.device("meta")` its parameters are shapes."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    model = CLIPTextModel(CLIPTextConfig(**{name: getattr(config, name) for name in names + more}))
    # Not a weight: checkpoints lack it or bring a damaged copy, and a meta buffer would have no numbers at all.
    positions = torch.arange(config.max_position_embeddings, device="cpu")[None]
    model.embeddings.position_ids = torch.nn.Buffer(positions, persistent=False)
    model.eval()
    return model


def load_tokenizer(folder: Path | None, max_length: int) -> Any:
    """The tokenizer in `folder`: vocab.json with merges.txt, or tokenizer.json alone; None: CLIP's, shipped here.

    InputError where the folder holds neither, or files that are no tokenizer.
    """
    if folder is None:
        return CLIPTokenizer(vocab=clip_vocabulary(), merges=list(clip_merges()), model_max_length=max_length)  # type: ignore[arg-type]
    special = _special_tokens(folder)
    vocab, merges, whole = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    try:
        if vocab.is_file() and merges.is_file():
            lines = merges.read_text(encoding="utf-8").splitlines()
            pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
            words = json.loads(vocab.read_text(encoding="utf-8"))
            return CLIPTokenizer(vocab=words, merges=pairs, model_max_length=max_length, **special)  # type: ignore[arg-type]
        if whole.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(whole), model_max_length=max_length, **special)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises just that for a file it cannot parse
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder}: its files are no tokenizer ({reason}); fetch them again") from None
    raise InputError(f"{folder}: no tokenizer there; vocab.json with merges.txt is wanted, or tokenizer.json")


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos, eos, unk and pad token as the folder's own files name them; a token may be a string or an object."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            mapping = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: not readable as JSON ({type(error).__name__}); fetch it again") from None
        for key in _SPECIAL_TOKENS:
            token = mapping.get(key) if isinstance(mapping, dict) else None
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[key] = text
    return found

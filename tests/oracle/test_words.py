"""New words and earlier layers against diffusers' own pipelines: textual inversions, added tokens, clip skip."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip import CLIPTextModel

from ledits_min.config import TextConfig
from ledits_min.errors import InputError
from ledits_min.files.configs import config_json
from ledits_min.pipeline import LEdits
from ledits_min.text import build_text_model
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary
from ledits_min.weights.load import load_checkpoint

CPU = torch.device("cpu")
State = dict[str, Tensor]


def their_model(config: TextConfig, state: State) -> Any:
    kind: Any = CLIPTextModelWithProjection if config.projection_dim else CLIPTextModel
    model = kind._from_config(build_text_model(config).config)
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    named = {name if name.startswith("text_pro") else f"{prefix}{name}": tensor for name, tensor in state.items()}
    model.load_state_dict(named, strict=True)
    return model.eval().requires_grad_(False)


def their_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    merges: Any = list(clip_merges())
    return CLIPTokenizer(vocab=clip_vocabulary(), merges=merges, model_max_length=77, pad_token=pad)  # type: ignore[arg-type]


def their_pipeline(checkpoints: ModuleType, family: str) -> Any:
    """diffusers' pipeline around the same reduced text encoders; its other networks are shapes."""
    states, configs = checkpoints.family_states(family), checkpoints.REDUCED[family]
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config_json(configs["unet"]))
    parts: dict[str, Any] = {"vae": None, "unet": unet, "scheduler": DDIMScheduler()}
    parts |= {"text_encoder": their_model(configs["text"], states["text"])}
    if family == "SDXL":
        second = their_model(configs["text_2"], states["text_2"])
        return StableDiffusionXLPipeline(
            **parts, tokenizer=their_tokenizer(), text_encoder_2=second, tokenizer_2=their_tokenizer("!"),
            add_watermarker=False,
        )  # fmt: skip
    tokenizer = their_tokenizer("!" if family == "SD 2.x" else "<|endoftext|>")
    return StableDiffusionPipeline(**parts, tokenizer=tokenizer, safety_checker=None, feature_extractor=None)


def ours(folder: Path, **options: Any) -> Any:
    return LEdits.from_checkpoint(load_checkpoint(folder, **options), CPU, torch.float32).text


def assert_same_text(found: Any, pipeline: Any, prompt: str, clip_skip: int | None = None) -> Tensor:
    """Tokens' states, and the pooled text where there is one; returns the states."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        wanted = pipeline.encode_prompt(prompt, device=CPU, do_classifier_free_guidance=False, clip_skip=clip_skip)
        torch.testing.assert_close(found.encode([prompt]).added, wanted[2], atol=1e-5, rtol=1e-5)
    else:
        wanted = pipeline.encode_prompt(prompt, CPU, 1, False, clip_skip=clip_skip)
    states: Tensor = found.encode([prompt]).tokens
    torch.testing.assert_close(states, wanted[0], atol=1e-5, rtol=1e-5)
    return states


def vectors(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x"])
def test_textual_inversions(checkpoints: ModuleType, tmp_path: Path, family: str) -> None:
    """A1111's and diffusers' files, of one vector and of three, in every place of a prompt."""
    checkpoints.write_family_folder(tmp_path / "model", family)
    width = checkpoints.REDUCED[family]["text"].hidden_size
    files = [tmp_path / f"{name}.safetensors" for name in ("bad-hands_5", "learned", "one")]
    save_file({"emb_params": vectors(3, width)}, files[0])
    save_file({"<cat-toy>": vectors(1, width, 1)[0]}, files[1])
    save_file({"emb_params": vectors(1, width, 2)}, files[2])
    pipeline = their_pipeline(checkpoints, family)
    logging.disable(logging.WARNING)
    for file, token in zip(files, ("bad-hands_5", "<cat-toy>", "othre"), strict=True):
        pipeline.load_textual_inversion(str(file), token=token, local_files_only=True)
    text = ours(tmp_path / "model", embedding=[files[0], files[1], (files[2], "othre")])
    plain = ours(tmp_path / "model")
    for prompt in (
        *("a photo of bad-hands_5", "<cat-toy>", "a <cat-toy>, bad-hands_5 and another othre, on grass", "a cat"),
        *("othre othre <cat-toy><cat-toy>", "bad-hands_5," * 30, "no hands"),
    ):
        states = assert_same_text(text, pipeline, prompt)
        known = any(word in prompt for word in ("bad-hands_5", "<cat-toy>", "othre"))
        assert torch.equal(states, plain.encode([prompt]).tokens) != known
    # A word is one in any case, as every other word of CLIP; inside another it is none.
    assert torch.equal(text.encode(["BAD-Hands_5"]).tokens, text.encode(["bad-hands_5"]).tokens)
    assert torch.equal(text.encode(["xothre"]).tokens, plain.encode(["xothre"]).tokens)


def test_textual_inversions_of_sdxl(checkpoints: ModuleType, tmp_path: Path) -> None:
    configs = checkpoints.REDUCED["SDXL"]
    checkpoints.write_family_folder(tmp_path / "model", "SDXL")
    state = {"clip_l": vectors(2, configs["text"].hidden_size), "clip_g": vectors(2, configs["text_2"].hidden_size, 1)}
    file = tmp_path / "stylx.safetensors"
    save_file(state, file)
    pipeline = their_pipeline(checkpoints, "SDXL")
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            state[name], token="stylx", text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )  # fmt: skip
    text = ours(tmp_path / "model", embedding=file)
    assert_same_text(text, pipeline, "a house in stylx, at night")
    assert text.words("a stylx") == [(320,), (49408,), (49409,)]


def test_a_lora_that_brings_its_word(checkpoints: ModuleType, tmp_path: Path) -> None:
    """OneTrainer's bundle_emb is the same as the embedding in a file of its own."""
    checkpoints.write_family_folder(tmp_path / "model", "SDXL")
    configs = checkpoints.REDUCED["SDXL"]
    state = {"clip_l": vectors(2, configs["text"].hidden_size), "clip_g": vectors(2, configs["text_2"].hidden_size, 1)}
    save_file(state, tmp_path / "word.safetensors")
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{layer}.lora_down.weight": vectors(2, 32), f"{layer}.lora_up.weight": torch.zeros(32, 2)}
    save_file(lora, tmp_path / "plain.safetensors")
    save_file(lora | {f"bundle_emb.my new.word.{n}": t for n, t in state.items()}, tmp_path / "x.safetensors")
    bundled = load_checkpoint(tmp_path / "model", lora=tmp_path / "x.safetensors")
    assert bundled.words == {"my new.word": 2} and bundled.text_config.vocab_size == 49410
    word = (tmp_path / "word.safetensors", "my new.word")
    apart = load_checkpoint(tmp_path / "model", lora=tmp_path / "plain.safetensors", embedding=word)
    for name in ("text", "text_2"):
        table = "embeddings.token_embedding.weight"
        assert torch.equal(getattr(bundled, name)[table], getattr(apart, name)[table])
    assert torch.equal(bundled.text_2["embeddings.token_embedding.weight"][-2:], state["clip_g"])
    assert sum("is the word 'my new.word', 2 vectors" in note for note in bundled.notes) == 1


def test_a_word_may_hold_spaces(checkpoints: ModuleType, tmp_path: Path) -> None:
    """OneTrainer's users name their words so; any white space between them is one space, as everywhere in CLIP."""
    checkpoints.write_family_folder(tmp_path / "model", "SD 1.x")
    save_file({"emb_params": vectors(2, 24)}, tmp_path / "x.safetensors")
    text = ours(tmp_path / "model", embedding=(tmp_path / "x.safetensors", "Ema Yasuhara"))
    for prompt in ("a photo of ema  yasuhara", "a photo of Ema Yasuhara"):
        assert text.tokenizer(prompt).input_ids == [49406, 320, 1125, 539, 49408, 49409, 49407]
    assert 49408 not in text.tokenizer("yasuhara").input_ids


REFUSED: dict[str, tuple[dict[str, Tensor], Any, str]] = {
    "another family": ({"emb_params": vectors(2, 768)}, None, "is 768 wide, the text encoder of"),
    "SDXL's": ({"clip_l": vectors(2, 24), "clip_g": vectors(2, 20)}, None, "is 24 and 20 wide"),
    "half of SDXL's": ({"clip_g": vectors(2, 24)}, None, "is no textual inversion"),
    "two words": ({"a": vectors(1, 24), "b": vectors(1, 24)}, None, "is no textual inversion"),
    "too many vectors": ({"emb_params": vectors(76, 24)}, None, "1 to 75 vectors of floats"),
    "no vector": ({"emb_params": vectors(0, 24)}, None, "1 to 75 vectors of floats"),
    "integers": ({"emb_params": torch.ones(2, 24, dtype=torch.int32)}, None, "I32"),
    "NaN": ({"emb_params": torch.full((2, 24), torch.nan)}, None, "NaN or infinity"),
    "no word": ({"emb_params": vectors(1, 24)}, "", "1 to 64 letters are wanted"),
    "spaces": ({"emb_params": vectors(1, 24)}, " a", "no space but single ones inside"),
    "control": ({"emb_params": vectors(1, 24)}, "a\x1b[2J", "1 to 64 letters are wanted"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_embeddings_that_are_refused(checkpoints: ModuleType, tmp_path: Path, name: str) -> None:
    state, word, reason = REFUSED[name]
    checkpoints.write_folder(tmp_path / "model")
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError) as caught:
        load_checkpoint(tmp_path / "model", embedding=(tmp_path / "x.safetensors", word))
    assert reason in str(caught.value) and str(caught.value).isprintable()


def test_a_word_given_twice(checkpoints: ModuleType, tmp_path: Path) -> None:
    checkpoints.write_folder(tmp_path / "model")
    save_file({"emb_params": vectors(1, 24)}, tmp_path / "x.safetensors")
    file = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="the word 'X' is given twice; write FILE:WORD"):
        load_checkpoint(tmp_path / "model", embedding=[file, (file, "X")])
    two = load_checkpoint(tmp_path / "model", embedding=[file, (file, "y")])
    assert two.words == {"x": 1, "y": 1}
    assert two.fingerprint != load_checkpoint(tmp_path / "model", embedding=[file]).fingerprint
    for wrong in (3, [None], ["x", 3], {"x": 1.5}.items()):
        with pytest.raises(InputError):
            load_checkpoint(tmp_path / "model", embedding=wrong)


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json"])
def test_added_tokens_of_a_folder(checkpoints: ModuleType, tmp_path: Path, where: str) -> None:
    """A model trained on a new word: a table of 49,409 rows, and the word in whichever file the writer put it."""
    theirs = their_tokenizer()
    theirs.add_tokens(["<new>"])
    folder = tmp_path / "model/tokenizer"
    checkpoints.write_family_folder(tmp_path / "model", "SD 1.x")
    folder.mkdir()
    theirs.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if where != "tokenizer.json":
        (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in clip_merges())]))
        (folder / "tokenizer.json").unlink()
        if where == "added_tokens.json":
            (folder / where).write_text('{"<new>": 49408}')
        else:
            token = {"content": "<new>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {where: {"49408": token}}))
    reread = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    found = load_checkpoint(tmp_path / "model")
    from ledits_min.weights.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(found.tokenizer, found.text_config)
    for prompt in ("a photo of <new>", "<NEW>, a cat", "a<new>b", "new"):
        assert tokenizer(prompt).input_ids == reread(prompt).input_ids == theirs(prompt).input_ids
    assert tokenizer("<new>").input_ids == [49406, 49408, 49407]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("added_tokens.json", {"<new>": 50000}, "should be number 50000, and is 49408"),
        ("added_tokens.json", {"<new>": "x"}, "an added token is '<new>', number 'x'"),
        ("added_tokens.json", {"x" * 300: 49408}, "a text of at most 256 letters"),
        ("added_tokens.json", {"cat</w>": 49408}, "should be number 49408, and is 2368"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"49408": {"content": None}}}, "an added token is 'None'"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "an added token is 'None'"),
        ("tokenizer_config.json", {"pad_token": "x" * 300}, "pad_token has 300 letters"),
    ],
)
def test_added_tokens_that_cannot_be(tmp_path: Path, name: str, content: Any, reason: str, checkpoints: Any) -> None:
    from ledits_min.weights.tokenizer import load_tokenizer

    (tmp_path / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in clip_merges()))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path, checkpoints.REDUCED_TEXT)
    assert reason in str(caught.value)


@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x", "SDXL"])
def test_clip_skip(checkpoints: ModuleType, tmp_path: Path, family: str) -> None:
    """A1111 counts from 1, diffusers from 0; SDXL reads the layer before the last by itself, which A1111 calls 2."""
    checkpoints.write_family_folder(tmp_path / "model", family)
    pipeline, own = their_pipeline(checkpoints, family), 2 if family == "SDXL" else 1
    # diffusers looks for the norm where transformers had it before 5.6.
    norm = SimpleNamespace(final_layer_norm=getattr(pipeline.text_encoder, "final_layer_norm", None))
    object.__setattr__(pipeline.text_encoder, "text_model", norm)
    results = [assert_same_text(ours(tmp_path / "model", clip_skip=own), pipeline, "a photo of a cat!")]
    assert torch.equal(results[0], ours(tmp_path / "model").encode(["a photo of a cat!"]).tokens)
    if family != "SDXL":  # the reduced encoders have two layers
        text = ours(tmp_path / "model", clip_skip=2)
        results.append(assert_same_text(text, pipeline, "a photo of a cat!", clip_skip=1))
        assert float((results[0] - results[1]).abs().max()) > 1e-2
    for wrong in (own - 1, 3, "2", 2.0):
        with pytest.raises(InputError, match=f"clip skip is .*{own} .. 2"):
            load_checkpoint(tmp_path / "model", clip_skip=wrong)


def test_clip_skip_of_sdxl(checkpoints: ModuleType, tmp_path: Path) -> None:
    """Still earlier layers of both encoders; the pooled text stays that of the last layer."""
    checkpoints.write_family_folder(tmp_path / "model", "SDXL")
    pipeline, text = their_pipeline(checkpoints, "SDXL"), ours(tmp_path / "model")
    for encoder in (text.first, text.second):
        encoder.skipped_layers = 1  # the first has two layers: this is its table of words
    states = assert_same_text(text, pipeline, "a photo of a cat!", clip_skip=1)
    assert float((states - ours(tmp_path / "model").encode(["a photo of a cat!"]).tokens).abs().max()) > 1e-2


def test_clip_skip_that_a_config_says(checkpoints: ModuleType, tmp_path: Path) -> None:
    """num_hidden_layers below the file's own: transformers reads no further, and so it is here."""
    checkpoints.write_family_folder(tmp_path / "model", "SD 1.x")
    path = tmp_path / "model/text_encoder/config.json"
    skipped = load_checkpoint(tmp_path / "model", clip_skip=2)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    theirs = CLIPTextModel.from_pretrained(tmp_path / "model/text_encoder", local_files_only=True).eval()
    pipeline = their_pipeline(checkpoints, "SD 1.x")
    pipeline.text_encoder = theirs
    assert_same_text(ours(tmp_path / "model"), pipeline, "a photo of a cat!")
    said = load_checkpoint(tmp_path / "model")
    assert said.fingerprint == skipped.fingerprint != load_checkpoint(tmp_path / "model", lora=()).fingerprint + "x"
    assert any("never read" in note for note in said.notes)

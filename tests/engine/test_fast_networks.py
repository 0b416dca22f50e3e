"""Every fast block is its plain block: in every precision, under autograd, and with whatever is put on its layers."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ledits_min import unet, vae
from ledits_min.config import SD15_UNET, SD15_VAE, UNetConfig
from ledits_min.engine import cpu, fast_networks, ops, torch_private
from ledits_min.engine.fast_networks import _FAST, FastAttention, FastConditioning, FastUNet, accelerate
from ledits_min.p2p import AttentionControl, token_mapper
from ledits_min.unet import BlockShape, Conditioning

SD1 = replace(
    SD15_UNET, block_out_channels=(16, 32, 32), norm_num_groups=8, layers_per_block=1, num_attention_heads=(2, 4, 2),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
)  # fmt: skip
SD2 = replace(SD1, use_linear_projection=True, upcast_attention=True)
SDXL = replace(
    SD1, use_linear_projection=True, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 1),
    addition_time_embed_dim=4, projection_class_embeddings_input_dim=10,
)  # fmt: skip
SMALLER = replace(  # a distilled one: nothing in the middle, and other depths on the way up than on the way down
    SDXL, mid_block_type="UNetMidBlock2D", transformer_layers_per_block=(1, (2,), (1,)),
    reverse_transformer_layers_per_block=((1, 2), (1, 1), 1),
)  # fmt: skip
UNETS = {"SD 1": SD1, "SD 2": SD2, "SDXL": SDXL, "distilled": SMALLER}
CODER = replace(SD15_VAE, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)
WIDE = {torch.bfloat16: 4e-2, torch.float16: 5e-3}  # of a whole network, relative to float32; most of it in every layer
TEXT = 7  # tokens


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


Call = Callable[[Any, tuple[Tensor, ...]], Tensor]


def plainly(block: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return block(*inputs)


@dataclass(frozen=True)
class Case:
    """A block, the shapes of what it is given, and how it is called with that; the fast one the same way."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    call: Call = plainly

    def block(self) -> nn.Module:
        torch.manual_seed(4)
        block = self.make()
        for weight in block.parameters():
            if weight.dim() == 1:  # of norms, too, which are ones and zeros at first
                weight.data.add_(0.3 * torch.randn_like(weight))
        return block.eval().requires_grad_(False)

    def inputs(self, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(5)
        drawn = (torch.randn(shape, generator=generator) for shape in self.shapes)
        return tuple(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in drawn)


def conditioning(block: nn.Module, time: Tensor, context: Tensor) -> Conditioning:
    return (FastConditioning if type(block) in _FAST.values() else Conditioning)(time, context)


def whole(block: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    x_t, context, *added = inputs
    return block(x_t, torch.tensor([981, 3]), context, *added)


def with_time(block: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    hidden, time, context = inputs
    return block(hidden, conditioning(block, time, context))


def with_skips(block: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    hidden, time, context, *skips = inputs
    return block(hidden, conditioning(block, time, context), list(skips))


def with_new_skips(block: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """All that a block leaves behind, side by side."""
    hidden, time, context = inputs
    skips: list[Tensor] = []
    result = block(hidden, conditioning(block, time, context), skips)
    assert all(isinstance(skip, Tensor) for skip in skips) and torch.equal(skips[-1], result)
    return torch.cat([each.flatten() for each in skips])


def attend_and_add(block: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    residual, tokens, context = inputs
    if isinstance(block, FastAttention):
        return block.add_to(residual, tokens, block.project(context), ops.attention)
    return residual + block(tokens, context, nn.functional.scaled_dot_product_attention)


def up_block(depth: int) -> unet.UpBlock:
    return unet.UpBlock([64, 48], BlockShape(32, 4, (depth, depth), True), SD1)


WHOLE = ((2, 4, 7, 9), (2, TEXT, 12))
MAPS = ((2, 32, 5, 7), (2, 64), (2, TEXT, 12))
DOWN = ((2, 16, 5, 8), (2, 64), (2, TEXT, 12))
UP = ((2, 32, 3, 4), (2, 64), (2, TEXT, 12), (2, 16, 5, 8), (2, 16, 3, 4), (2, 32, 3, 4))
CASES = {
    **{
        name: Case(partial(unet.UNet, c), WHOLE + ((2, 10),) * bool(c.addition_time_embed_dim), whole)
        for name, c in UNETS.items()
    },
    "down block": Case(lambda: unet.DownBlock([16, 32], BlockShape(32, 4, (1, 1), True), SD1), DOWN, with_new_skips),
    "mid block": Case(lambda: unet.MidBlock(BlockShape(32, 4, (1,), False), SD1), MAPS, with_time),
    "downsampling": Case(lambda: unet.Downsample(32), ((2, 32, 5, 7),)),
    "up block": Case(lambda: up_block(1), UP, with_skips),
    "up block without attention": Case(lambda: up_block(0), UP, with_skips),
    "resnet block": Case(lambda: unet.ResnetBlock(32, 32, SD1), MAPS, with_time),
    "resnet block that widens": Case(lambda: unet.ResnetBlock(32, 48, SD1), MAPS, with_time),
    "transformer": Case(lambda: unet.Transformer(32, 4, 2, SD1), MAPS, with_time),
    "transformer, linear, upcast": Case(lambda: unet.Transformer(32, 4, 2, SD2), MAPS, with_time),
    "transformer block": Case(lambda: unet.TransformerBlock(32, 4, SD1), ((2, 35, 32), *MAPS[1:]), with_time),
    "transformer block, upcast": Case(lambda: unet.TransformerBlock(32, 4, SD2), ((2, 35, 32), *MAPS[1:]), with_time),
    "self-attention": Case(lambda: unet.Attention(32, 32, 4), ((2, 35, 32),) * 3, attend_and_add),
    "cross-attention, upcast": Case(
        lambda: unet.Attention(32, 12, 4, upcast=True), ((2, 35, 32), (2, 35, 32), (2, TEXT, 12)), attend_and_add
    ),
    "upsampling to twice": Case(lambda: unet.Upsample(32), ((2, 32, 3, 5),), lambda b, i: b(*i, torch.Size((6, 10)))),
    "upsampling to an odd size": Case(lambda: unet.Upsample(32), ((2, 32, 3, 5),), lambda b, i: b(*i, (5, 9))),
    "encoder": Case(lambda: vae.Encoder(CODER), ((2, 3, 10, 14),)),
    "decoder": Case(lambda: vae.Decoder(CODER), ((2, 4, 5, 7),)),
    "VAE's resnet block": Case(lambda: vae.ResnetBlock(32, 32, 8), ((2, 32, 5, 7),)),
    "VAE's resnet block that widens": Case(lambda: vae.ResnetBlock(32, 48, 8), ((2, 32, 5, 7),)),
    "VAE's attention": Case(lambda: vae.Attention(32, 8), ((2, 32, 5, 7),)),
    "VAE's upsampling": Case(lambda: vae.Upsample(32), ((2, 32, 3, 5),)),
    "VAE, encoding": Case(lambda: vae.VAE(CODER), ((2, 3, 10, 14),), lambda b, i: b.encode(*i)),
    "VAE, decoding": Case(lambda: vae.VAE(CODER), ((2, 4, 5, 7),), lambda b, i: b.decode(*i)),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


def accelerated(block: nn.Module) -> nn.Module:
    """A fast copy."""
    return accelerate(cast(unet.UNet, copy.deepcopy(block)))


def in_layout(block: nn.Module, layout: torch.memory_format) -> nn.Module:
    return block.to(memory_format=layout)  # type: ignore[call-overload]


def test_every_fast_class_is_met() -> None:
    assert {type(case.make()) for case in CASES.values()} == {*_FAST, vae.VAE}


def test_accelerating_leaves_weights_names_and_classes_alone() -> None:
    plain = CASES["SDXL"].block()
    fast = accelerated(plain)
    assert [*fast.state_dict()] == [*plain.state_dict()]
    assert all(torch.equal(*pair) for pair in zip(fast.parameters(), plain.parameters(), strict=True))
    kinds = {type(module) for module in fast.modules()}
    assert not kinds & set(_FAST) and all(issubclass(fast, plain) for plain, fast in _FAST.items())
    assert {type(module) for module in accelerate(cast(unet.UNet, fast)).modules()} == kinds
    assert not {type(module) for module in plain.modules()} & set(_FAST.values()), "the copy alone is fast"


@each
@layouts
@torch.no_grad()
def test_in_float32(case: Case, layout: torch.memory_format) -> None:
    block, inputs = in_layout(case.block(), layout), case.inputs(layout)
    kept = [x.clone() for x in inputs]
    plain, fast = case.call(block, inputs), case.call(accelerated(block), inputs)
    assert fast.shape == plain.shape and fast.dtype == plain.dtype == torch.float32
    assert relative(fast, plain) < 1e-5
    assert all(map(torch.equal, inputs, kept)), "an input was written over"


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As where kernels run: sums wait for norms, which torch computes here. Notes whether any did."""
    waited: list[bool] = []

    def defers_sums(hidden: Tensor, *layers: nn.Module) -> bool:
        weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
        fits = hidden.dim() == 3 or hidden.is_contiguous(memory_format=torch.channels_last)
        alike = all(weight.dtype == hidden.dtype for weight in weights)
        waited.append(torch_private.is_untouched(*layers) and alike and fits and not cpu._is_recorded(hidden, *weights))
        return waited[-1]

    monkeypatch.setattr(fast_networks, "defers_sums", defers_sums)
    return waited


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@torch.no_grad()
def test_with_sums_that_wait_for_norms(case: Case, dtype: torch.dtype, deferring: list[bool]) -> None:
    block = in_layout(case.block().to(dtype), torch.channels_last)
    inputs = tuple(x.to(dtype) for x in case.inputs(torch.channels_last))
    kept = [x.clone() for x in inputs]
    exact = case.call(copy.deepcopy(block).float(), tuple(x.float() for x in inputs))
    plain, fast = case.call(block, inputs), case.call(accelerated(block), inputs)
    assert fast.shape == plain.shape and fast.dtype == plain.dtype
    if dtype == torch.float32:
        assert relative(fast, plain) < 1e-5
    else:
        assert relative(fast, exact) <= 2.0 * relative(plain, exact) < WIDE[dtype]
    assert all(map(torch.equal, inputs, kept)), "an input was written over"
    known = (unet.Attention, unet.Upsample, vae.Attention, vae.Upsample)
    assert any(deferring) or isinstance(block, known)


class Counting(TorchDispatchMode):
    """What torch is asked to do outside the operations that a kernel does as one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.biased = self.joined = self.sums_of_maps = self.sums_of_tokens = self.products = 0
        self.kernels: dict[str, int] = {}
        self.inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            name = function.overloadpacket.__name__
            self.biased += name == "convolution" and args[2] is not None
            self.joined += name == "cat"
            self.products += name in ("mm", "addmm", "addmm_", "linear")
            if name in ("add", "add_"):
                self.sums_of_maps += args[0].dim() == 4
                self.sums_of_tokens += args[0].dim() == 3
        return function(*args, **kwargs or {})

    def as_one(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            if self.inside:
                return operation(*args, **more)
            self.kernels[name] = self.kernels.get(name, 0) + 1
            self.inside = True
            try:
                return operation(*args, **more)
            finally:
                self.inside = False

        return counted


@torch.no_grad()
@pytest.mark.usefixtures("deferring")
def test_no_launch_only_adds_a_bias_or_joins_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a convolution add its own: cuDNN launches that apart. The last one is the exception, in float32."""
    plain, fast = both(SD1)
    in_layout(fast, torch.channels_last)
    counting = Counting()
    for name in ("group_norm_silu", "add_group_norm_silu", "add_maps", "add_layer_norm"):
        operation = counting.as_one(name, getattr(ops, name))
        monkeypatch.setattr(ops, name, operation)
        if hasattr(fast_networks, name):
            monkeypatch.setattr(fast_networks, name, operation)
    x_t, t, context, _ = questions(SD1, 3)
    time, text = fast.embed(t), fast.project(context)
    wanted = plain(x_t, t, context)
    fast(x_t, time, text)  # once, what is made once is made
    counting.kernels.clear()
    with counting:
        found = fast(x_t, time, text)
    assert relative(found, wanted) < 1e-5
    resnets = sum(isinstance(module, unet.ResnetBlock) for module in plain.modules())
    transformers = [module for module in plain.modules() if isinstance(module, unet.Transformer)]
    resized = 2 * (len(SD1.block_out_channels) - 1)
    assert (counting.biased, counting.joined, counting.sums_of_maps) == (1, 0, 0)
    assert counting.sums_of_tokens == len(transformers)  # in front of each one's way out, which has no norm
    assert counting.kernels["add_layer_norm"] == 3 * len(transformers)
    norms = counting.kernels["group_norm_silu"] + counting.kernels["add_group_norm_silu"]
    assert norms == 2 * resnets + len(transformers) + 1
    # A map is added up apart only where it is resized, which has no norm in front.
    assert counting.kernels["add_maps"] <= resized


def replace_data(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.data = 0.5 * weight.data


@torch.no_grad()
@pytest.mark.usefixtures("deferring")
def test_what_is_folded_follows_the_weights() -> None:
    """Biases changed in place, replaced, loaded, narrowed; and weights that were moved to lie behind one another."""
    for change in (
        lambda network: [weight.mul_(1.5) for weight in network.parameters()],
        replace_data,
        lambda network: network.load_state_dict({k: 0.7 * v for k, v in network.state_dict().items()}),
        lambda network: network.load_state_dict({k: 0.7 * v for k, v in network.state_dict().items()}, assign=True),
        lambda network: network.double().float(),
    ):
        plain, fast = both(SD1)
        for network in (plain, fast):
            in_layout(network, torch.channels_last)
        x_t, t, context, _ = questions(SD1, 2)
        before = fast(x_t, t, context)
        for network in (plain, fast):
            change(network)  # type: ignore[no-untyped-call]
        wanted = plain(x_t, t, context)
        assert relative(fast(x_t, t, context), wanted) < 1e-5
        assert [*fast.state_dict()] == [*plain.state_dict()]
        assert torch.isfinite(before).all()


@pytest.mark.parametrize("name", ["down_blocks.1", "mid_block", "up_blocks.1", "down_blocks.0.resnets.0",
                                  "up_blocks.1.attentions.1", "mid_block.attentions.0.transformer_blocks.0",
                                  "up_blocks.0.resnets.1", "down_blocks.0.downsamplers.0"])  # fmt: skip
@pytest.mark.parametrize("when", ["before", "behind"])
@torch.no_grad()
@pytest.mark.usefixtures("deferring")
def test_a_hook_on_a_block_sees_maps(name: str, when: str) -> None:
    """And what it changes is honoured, as the plain network does."""
    plain, fast = both(SD1)
    case = CASES["SD 1"]
    for network in (plain, fast):
        in_layout(network, torch.channels_last)
    before = case.call(plain, case.inputs(torch.channels_last))

    def change(module: nn.Module, inputs: Any, *result: Tensor) -> Any:
        hidden = result[0] if result else inputs[0]
        assert isinstance(hidden, Tensor)
        return -1.3 * hidden + 0.1 if result else (-1.3 * hidden + 0.1, *inputs[1:])

    register = "register_forward_pre_hook" if when == "before" else "register_forward_hook"
    for network in (plain, fast):
        getattr(network.get_submodule(name), register)(change)
    assert honours(plain, fast, case, before) is None


@each
@torch.no_grad()
def test_in_slices_and_fused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The routes that a CPU with bfloat16 takes, in float32, where nothing is excused by rounding."""
    if not torch_private.has_fused_products():
        pytest.skip("this torch has no fused products")
    fused = []

    def fuses(*tensors: Tensor) -> bool:
        fused.append(all(tensor.dtype == torch.float32 for tensor in tensors) and not cpu._is_recorded(*tensors))
        return fused[-1]

    monkeypatch.setattr(cpu, "fuses", fuses)
    monkeypatch.setattr(cpu, "FEED_FORWARD", 4 * 32)
    block, inputs = in_layout(case.block(), torch.channels_last), case.inputs(torch.channels_last)
    assert relative(case.call(accelerated(block), inputs), case.call(block, inputs)) < 1e-5
    assert any(fused) or isinstance(block, vae.Attention | unet.Downsample)


@each
@layouts
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("dtype", WIDE)
@torch.no_grad()
def test_in_half_precision(
    case: Case, layout: torch.memory_format, vectors: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be off float32 by no more than twice what the plain block is, whose weights and inputs are the same."""
    if vectors and (dtype != torch.bfloat16 or not cpu.has_fused_products()):
        monkeypatch.setattr(cpu, "has_fused_products", lambda: False)
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: vectors)
    monkeypatch.setattr(cpu, "FEW_SCORES", 0)
    block, inputs = in_layout(case.block().to(dtype), layout), tuple(x.to(dtype) for x in case.inputs(layout))
    plain, fast = case.call(block, inputs), case.call(accelerated(block), inputs)
    exact = case.call(block.float(), tuple(x.float() for x in inputs))
    assert fast.shape == plain.shape and fast.dtype == plain.dtype
    own, off = relative(plain, exact), relative(fast, exact)
    assert off <= 2.0 * own and off < WIDE[dtype], (off, own)


@each
@layouts
def test_gradients_are_the_plain_ones(case: Case, layout: torch.memory_format) -> None:
    """Of every weight and every input."""
    block = in_layout(case.block(), layout)
    gradients = []
    for one in (block, accelerated(block)):
        one.requires_grad_(True)
        inputs = tuple(x.requires_grad_(True) for x in case.inputs(layout))
        result = case.call(one, inputs)
        generator = torch.Generator().manual_seed(6)
        (result * torch.randn(result.shape, generator=generator)).sum().backward()
        leaves = dict(one.named_parameters()) | {f"input {n}": x for n, x in enumerate(inputs)}
        gradients.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    plain, fast = gradients
    assert plain.keys() == fast.keys() and len(plain) > 1
    largest = max(float(gradient.norm()) for gradient in plain.values())
    for name, gradient in plain.items():
        # What is zero but for rounding (of a bias in front of a norm) is held against the others.
        assert (fast[name] - gradient).norm() < 1e-5 * max(float(gradient.norm()), 1e-2 * largest), name


# --- what the fast UNet takes besides -------------------------------------------------------------------------------


@pytest.fixture(params=[*UNETS])
def pair(request: pytest.FixtureRequest) -> tuple[unet.UNet, FastUNet]:
    return both(UNETS[request.param])


def both(config: UNetConfig) -> tuple[unet.UNet, FastUNet]:
    block = Case(partial(unet.UNet, config), ()).block()
    return cast(unet.UNet, block), cast(FastUNet, accelerated(block))


def questions(config: UNetConfig, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x_t, t, context and what SDXL adds, for `rows` rows."""
    generator = torch.Generator().manual_seed(8)
    x_t, context = torch.randn(rows, 4, 9, 7, generator=generator), torch.randn(rows, TEXT, 12, generator=generator)
    added = torch.randn(rows, 10, generator=generator) if config.projection_class_embeddings_input_dim else None
    return x_t, torch.arange(rows) * 100 + 1, context, added


@torch.no_grad()
def test_what_is_made_of_text_and_time_before(pair: tuple[unet.UNet, FastUNet]) -> None:
    plain, fast = pair
    x_t, t, context, added = questions(plain.config, 3)
    wanted = plain(x_t, t, context, added)
    assert relative(fast(x_t, fast.embed(t, added), fast.project(context)), wanted) < 1e-5
    assert relative(fast(x_t, t, fast.project(context), added), wanted) < 1e-5
    assert relative(fast(x_t, fast.embed(t, added), context), wanted) < 1e-5


@pytest.mark.parametrize("rows", [[0, 0], [0, 1, 1], [1, 0, 1, 0, 0], [0, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("projected", [False, True])
@torch.no_grad()
def test_rows_that_share_their_input(pair: tuple[unet.UNet, FastUNet], rows: list[int], projected: bool) -> None:
    """Several texts about one x_t, at one t; whatever the order."""
    plain, fast = pair
    x_t, t, _, added = questions(plain.config, max(rows) + 1)
    _, _, context, _ = questions(plain.config, len(rows))
    each_added = None if added is None else added[rows]
    wanted = plain(x_t[rows], t[rows], context, each_added)
    text = fast.project(context) if projected else context
    found = fast(x_t, t[rows], text, each_added, rows=torch.tensor(rows))
    assert found.shape == wanted.shape and relative(found, wanted) < 1e-5


@pytest.mark.parametrize("ups", [("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), ("UpBlock2D",) * 3])
@torch.no_grad()
def test_rows_that_share_their_input_until_the_way_up(ups: tuple[str, ...]) -> None:
    """Or to the end, where nothing looks at the text."""
    config = replace(
        SD1, mid_block_type="UNetMidBlock2D", down_block_types=("DownBlock2D",) * 3, up_block_types=ups
    )  # fmt: skip
    plain, fast = both(config)
    x_t, t, _, _ = questions(config, 2)
    rows, context = [0, 1, 1], questions(config, 3)[2]
    found = fast(x_t, t[rows], context, rows=torch.tensor(rows))
    assert relative(found, plain(x_t[rows], t[rows], context)) < 1e-5


@torch.no_grad()
def test_attention_that_is_controlled(pair: tuple[unet.UNet, FastUNet]) -> None:
    plain, fast = pair
    x_t, t, context, added = questions(plain.config, 4)
    mapper = token_mapper([(1,), (2,)], [(1,), (7,), (2,)], TEXT)
    control = AttentionControl(torch.tensor([0, 2]), torch.tensor([1, 3]), mapper, 1000)
    wanted = plain(x_t, t, context, added, control)
    assert relative(fast(x_t, t, context, added, control), wanted) < 1e-5
    found = fast(x_t, fast.embed(t, added), fast.project(context), attention=control)
    assert relative(found, wanted) < 1e-5
    assert relative(plain(x_t, t, context, added), wanted) > 1e-3


# --- what is put on layers ------------------------------------------------------------------------------------------

LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
NETWORKS = {name: case for name, case in CASES.items() if name in (*UNETS, "VAE, encoding", "VAE, decoding")}


@pytest.fixture(params=["products", "sums"])
def eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes every shortcut there is, so that a layer is called only where it must be."""
    if request.param == "sums":
        request.getfixturevalue("deferring")
        return
    monkeypatch.setattr(cpu, "FEED_FORWARD", 4 * 32)
    if torch_private.has_fused_products():
        monkeypatch.setattr(cpu, "fuses", lambda *tensors: not cpu._is_recorded(*tensors))


def honours(plain: nn.Module, fast: nn.Module, case: Case, before: Tensor, bound: float = 1e-5) -> str | None:
    """What is wrong, if anything: the plain network's answer must have changed, and the fast one's with it."""
    inputs = case.inputs(torch.channels_last)
    wanted = case.call(plain, inputs)
    if relative(wanted, before) < 10 * bound:
        return "the plain network does not look at it"
    off = relative(case.call(fast, inputs), wanted)
    return None if off < bound else f"the fast network is off by {off:.1g}"


@pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.usefixtures("eager")
@torch.no_grad()
def test_a_hook_on_any_layer_is_honoured(case: Case, when: str) -> None:
    plain = in_layout(case.block(), torch.channels_last)
    fast = accelerated(plain)
    before = case.call(plain, case.inputs(torch.channels_last))
    wrong: dict[str, str] = {}
    # One of each kind: of those whose names tell them apart by a number alone.
    kinds = {re.sub(r"\d+", "n", name): name for name, layer in plain.named_modules() if isinstance(layer, LAYERS)}
    looked_at = 0
    for name in kinds.values():
        calls: list[int] = []

        def change(module: nn.Module, inputs: Any, *result: Tensor, calls: list[int] = calls) -> Any:
            calls.append(0)
            return -1.3 * result[0] + 0.1 if result else (-1.3 * inputs[0] + 0.1, *inputs[1:])

        register = "register_forward_pre_hook" if when == "before" else "register_forward_hook"
        handles = [getattr(network.get_submodule(name), register)(change) for network in (plain, fast)]
        problem = honours(plain, fast, case, before)
        if calls:  # an encoding does not call the decoder
            looked_at += 1
            wrong |= {name: problem} if problem else {}
        for handle in handles:
            handle.remove()
    assert looked_at > 10 and not wrong
    assert relative(case.call(fast, case.inputs(torch.channels_last)), before) < 1e-5


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "proj", "net.2", "conv1", "conv2", "conv",
           "conv_shortcut", "time_emb_proj"]  # fmt: skip


@pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("eager")
@torch.no_grad()
def test_an_adapter_on_any_kind_of_layer_is_honoured(case: Case, target: str) -> None:
    """peft's LoRA, put on a network that is fast already, and on one that becomes it."""
    block = in_layout(case.block(), torch.channels_last)
    if not any(name.split(".")[-len(target.split(".")) :] == target.split(".") for name, _ in block.named_modules()):
        pytest.skip("this network has no such layer")
    before = case.call(block, case.inputs(torch.channels_last))
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=[target], init_lora_weights=False)

    def adapted(network: nn.Module) -> nn.Module:
        torch.manual_seed(7)
        return peft.inject_adapter_in_model(config, network).eval()

    plain, later = adapted(copy.deepcopy(block)), adapted(accelerated(block))
    for fast in (later, accelerated(plain)):
        assert honours(plain, fast, case, before) is None


@pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.usefixtures("eager")
@torch.no_grad()
def test_quantised_layers_are_honoured(case: Case) -> None:
    block = in_layout(case.block(), torch.channels_last)
    before = case.call(block, case.inputs(torch.channels_last))

    def quantised(network: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and people have it
            return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, torch.qint8)

    plain = quantised(block)
    assert any(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in plain.modules())
    for fast in (quantised(accelerated(block)), accelerated(plain)):
        assert honours(plain, fast, case, before, bound=1e-4) is None

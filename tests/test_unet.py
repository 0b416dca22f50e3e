"""The UNet's own promises; tests/oracle/test_unet.py compares its numbers with diffusers."""

from collections import Counter
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from ledits_min.config import SD15_UNET, UNetConfig
from ledits_min.engine.fast_networks import FastUNet, accelerate
from ledits_min.sega import percentile_mask
from ledits_min.unet import UNet

CONFIG = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    num_attention_heads=(4, 4, 4),
    cross_attention_dim=24,
    norm_num_groups=8,
    norm_eps=1e-5,
    use_linear_projection=False,
    sample_size=16,
)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


def inputs(batch: int, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 4, height, width, generator=generator)
    return x_t, torch.tensor([981, 1, 440])[:batch], torch.randn(batch, 5, 24, generator=generator)


def test_names_are_those_of_a_published_checkpoint() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in UNet(SD15_UNET).state_dict().items()}
    assert len(shapes) == 686
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert shapes["conv_in.weight"] == (320, 4, 3, 3)
    assert shapes["time_embedding.linear_1.weight"] == (1280, 320)
    assert shapes[f"{block}.attn1.to_q.weight"] == (640, 640)
    assert shapes[f"{block}.attn2.to_k.weight"] == (640, 768)
    assert shapes[f"{block}.attn2.to_out.0.bias"] == (640,)
    assert shapes[f"{block}.ff.net.0.proj.weight"] == (5120, 640)
    assert shapes[f"{block}.ff.net.2.weight"] == (640, 2560)
    assert shapes["mid_block.attentions.0.proj_in.weight"] == (1280, 1280, 1, 1)
    assert shapes["up_blocks.0.upsamplers.0.conv.weight"] == (1280, 1280, 3, 3)
    assert shapes["up_blocks.3.resnets.0.conv_shortcut.weight"] == (320, 960, 1, 1)
    assert shapes["conv_norm_out.weight"] == (320,)


@pytest.mark.parametrize("attends", [(True, True, True), (False, True, True), (False, False, False)])
@pytest.mark.parametrize("rows", [[0, 0, 0], [0, 0, 1], [1, 0, 0]])
@pytest.mark.parametrize("size", [(16, 16), (9, 7)])
def test_rows_about_one_input_share_what_comes_before_the_text(
    attends: tuple[bool, ...], rows: list[int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    down = tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends)
    config = replace(CONFIG, down_block_types=down, use_linear_projection=size != (16, 16))
    unet = UNet(config).eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    accelerate(unet)
    x_t, t, context = inputs(3, *size)
    t = t[rows]  # rows about one input are about one t
    sizes: dict[str, list[int]] = {"conv_in": [], "attn1": [], "attn2": []}
    for name, module in unet.named_modules():
        if (kind := name.removesuffix(".to_q").rpartition(".")[2]) in sizes and not list(module.children()):
            seen = sizes[kind]
            module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(output)))
    given = max(rows) + 1
    shared = unet(x_t[:given], t, context, rows=torch.tensor(rows))
    assert sizes["conv_in"] == [given] and set(sizes["attn2"]) == {3}
    assert sizes["attn1"] == [given, *[3] * (len(sizes["attn1"]) - 1)]
    torch.testing.assert_close(shared, unet(x_t[rows], t, context), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (65, 33), (7, 13), (1, 1), (2, 9)])
def test_the_prediction_has_the_size_of_the_latents(unet: UNet, size: tuple[int, int]) -> None:
    """A fault of others: sizes that do not halve evenly."""
    x_t, t, context = inputs(2, *size)
    eps = unet(x_t, t, context)
    assert eps.shape == x_t.shape
    assert eps.isfinite().all()


def test_samples_of_a_batch_do_not_mix(unet: UNet) -> None:
    x_t, t, context = inputs(3)
    together = unet(x_t, t, context)
    for i in range(3):
        alone = unet(x_t[i : i + 1], t[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_returns_float32_from_any_input_dtype(unet: UNet, dtype: torch.dtype) -> None:
    """A fault of others: torch has no quantile in half precision."""
    x_t, t, context = inputs(2)
    eps = unet.to(dtype)(x_t, t, context)
    assert eps.dtype == torch.float32
    assert torch.equal(eps, unet(x_t.to(dtype), t, context.to(dtype)))
    assert torch.equal(eps, unet(x_t.double(), t, context.double()))
    percentile_mask(eps, 0.95)
    with pytest.raises(RuntimeError, match="float or double"):
        percentile_mask(eps.to(dtype), 0.95)


def test_a_half_precision_output_would_spoil_the_mask(unet: UNet) -> None:
    """The difference of two branches, rounded to bfloat16 each, takes few values: ties swell the 5 % mask."""
    x_t, t, context = inputs(2)
    unet.to(torch.bfloat16)
    branches = [unet(x_t, t, context), unet(x_t, t, context + 0.01)]
    ours = percentile_mask(branches[1] - branches[0], 0.95).float().mean()
    rounded = [branch.bfloat16().float() for branch in branches]
    theirs = percentile_mask(rounded[1] - rounded[0], 0.95).float().mean()
    assert 0.045 < float(ours) < 0.055
    assert float(theirs) > 0.06


def test_every_weight_is_used() -> None:
    """A weight without a gradient would be a layer that forward forgot."""
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    unet(*inputs(2)).square().sum().backward()
    assert [name for name, weight in unet.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_is_called_once_as_a_module(linear: bool, dtype: torch.dtype) -> None:
    """So that hooks, adapters and quantised layers act on it."""
    torch.manual_seed(0)
    unet = UNet(replace(CONFIG, use_linear_projection=linear)).to(dtype).eval().requires_grad_(False)
    called: Counter[str] = Counter()
    for name, module in unet.named_modules():
        if list(module.parameters(recurse=False)):
            called[name] = 0
            module.register_forward_hook(lambda module, args, output, name=name: called.update([name]))
    unet(*inputs(2))
    assert len(called) > 100 and {name: count for name, count in called.items() if count != 1} == {}


def test_an_adapter_on_its_layers_acts_and_can_be_trained(unet: UNet) -> None:
    peft = pytest.importorskip("peft")
    asked = inputs(2)
    before = unet(*asked)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "ff.net.2"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, unet)
    adapted = unet(*asked)
    assert (adapted - before).norm() > 1e-2 * before.norm()
    adapted.square().sum().backward()
    adapters = {name: weight for name, weight in unet.named_parameters() if "lora_" in name}
    blocks = sum("attn1" in name for name in adapters) // 4
    assert len(adapters) == blocks * (2 * 2 + 2 * 2 + 2) and blocks == 7
    assert [name for name, weight in adapters.items() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_linear_layers_can_be_quantised(unet: UNet) -> None:
    asked = inputs(2)
    before = unet(*asked)
    quantised = torch.ao.quantization.quantize_dynamic(unet, {nn.Linear})  # type: ignore[no-untyped-call]
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    after = quantised(*asked)
    assert 0 < (after - before).norm() < 0.05 * before.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_sees_one_graph(unet: UNet, dtype: torch.dtype) -> None:
    """As the engine calls it, without a break; the graph is run as it was traced, for a compiler takes minutes."""
    fast = cast(FastUNet, accelerate(unet.to(dtype)))
    compiled = torch.compile(fast.forward, backend="eager", dynamic=False, fullgraph=True)
    x_t, t, context = inputs(2, 64, 32)
    asked = x_t, fast.embed(t), fast.project(context)
    plain = fast(*asked)
    assert (compiled(*asked) - plain).norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * plain.norm()

"""The VAE's own promises; tests/oracle/test_vae.py compares its numbers with diffusers."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ledits_min.config import SD15_VAE, VAEConfig
from ledits_min.vae import VAE

CONFIG = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=0.18215,
    mid_block_add_attention=True,
    sample_size=32,
)


def make(config: VAEConfig = CONFIG) -> VAE:
    torch.manual_seed(0)
    return VAE(config).eval().requires_grad_(False)


def picture(batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return 2.0 * torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) - 1.0


def test_names_are_those_of_a_published_checkpoint() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in VAE(SD15_VAE).state_dict().items()}
    assert len(shapes) == 248
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.down_blocks.0.downsamplers.0.conv.weight"] == (128, 128, 3, 3)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert shapes["decoder.up_blocks.3.resnets.2.norm1.weight"] == (128,)
    assert shapes["quant_conv.weight"] == (8, 8, 1, 1)
    assert shapes["post_quant_conv.bias"] == (4,)


@pytest.mark.parametrize("size", [(32, 32), (4, 4), (36, 20), (28, 52)])
def test_sizes(size: tuple[int, int]) -> None:
    vae, image = make(), picture(2, *size)
    latents = vae.encode(image)
    assert latents.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert vae.decode(latents).shape == image.shape


def test_encoding_is_the_scaled_mode_of_the_posterior() -> None:
    vae, image = make(), picture()
    assert torch.equal(vae.encode(image), vae.encode(image))
    mean, logvar = vae.moments(image)
    assert mean.shape == logvar.shape
    torch.testing.assert_close(vae.encode(image), 0.18215 * mean)


def test_the_scaling_factor_comes_from_the_config() -> None:
    """A fault of others: 0.18215 written into the code. Twice the factor: twice the latents, the same picture back."""
    vae, other, image = make(), make(replace(CONFIG, scaling_factor=2 * 0.18215)), picture()
    torch.testing.assert_close(other.encode(image), 2.0 * vae.encode(image))
    torch.testing.assert_close(other.decode(other.encode(image)), vae.decode(vae.encode(image)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_returns_float32(dtype: torch.dtype) -> None:
    vae = make().to(dtype)
    latents = vae.encode(picture())
    assert latents.dtype == torch.float32
    assert vae.decode(latents).dtype == torch.float32


@pytest.mark.parametrize("attention", [False, True])
def test_every_weight_is_used(attention: bool) -> None:
    torch.manual_seed(0)
    vae = VAE(replace(CONFIG, mid_block_add_attention=attention))
    mean, logvar = vae.moments(picture())
    (vae.decode(mean).square().sum() + logvar.sum()).backward()
    assert [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_is_called_once_as_a_module(dtype: torch.dtype) -> None:
    """So that hooks, adapters and quantised layers act on it; once in a round trip of a picture."""
    vae = make().to(dtype)
    called: Counter[str] = Counter()
    for name, module in vae.named_modules():
        if list(module.parameters(recurse=False)):
            called[name] = 0
            module.register_forward_hook(lambda module, args, output, name=name: called.update([name]))
    vae.decode(vae.encode(picture()))
    assert len(called) > 60 and {name: count for name, count in called.items() if count != 1} == {}


def test_an_adapter_on_its_layers_acts_and_can_be_trained() -> None:
    peft = pytest.importorskip("peft")
    vae = make()
    before = vae.decode(vae.encode(picture()))
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, vae)
    adapted = vae.decode(vae.encode(picture()))
    assert (adapted - before).norm() > 1e-3 * before.norm()
    adapted.square().sum().backward()
    adapters = {name: weight for name, weight in vae.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 2
    assert [name for name, weight in adapters.items() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_linear_layers_can_be_quantised() -> None:
    vae = make()
    before = vae.decode(vae.encode(picture()))
    quantised = torch.ao.quantization.quantize_dynamic(vae, {nn.Linear})  # type: ignore[no-untyped-call]
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    after = quantised.decode(quantised.encode(picture()))
    assert 0 < (after - before).norm() < 0.05 * before.norm()

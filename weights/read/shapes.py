"""The name and shape of every tensor of the three networks, by rule from their configs.

This is what a checkpoint is held against before anything is read, so a wrong file is refused by name and
not by a failing layer. Names are those of the modules: diffusers' for UNet and VAE, transformers' for the
text model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ledits_min.config import TextConfig, UNetConfig, VAEConfig
from ledits_min.errors import InputError, quoted
from ledits_min.files.header import TensorInfo
from ledits_min.weights.read.published import FAMILIES, Config, family_of

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")

_MANY = 16  # missing tensors: no accident, but whole layers

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def unet_shapes(config: UNetConfig) -> Shapes:
    """Every tensor of `UNet(config)`: 686 for Stable Diffusion 1.x and 2.x, 1680 for XL."""
    widths = config.block_out_channels
    time_width = 4 * widths[0]
    shapes = _conv("conv_in", config.in_channels, widths[0])
    shapes |= _linear("time_embedding.linear_1", widths[0], time_width)
    shapes |= _linear("time_embedding.linear_2", time_width, time_width)
    if added_width := config.projection_class_embeddings_input_dim:
        shapes |= _linear("add_embedding.linear_1", added_width, time_width)
        shapes |= _linear("add_embedding.linear_2", time_width, time_width)

    skips = [widths[0]]
    channels = widths[0]
    for level, width in enumerate(widths):
        for layer, depth in enumerate(config.down_depths[level]):
            shapes |= _resnet(f"down_blocks.{level}.resnets.{layer}", channels, width, time_width)
            if depth:
                shapes |= _transformer(f"down_blocks.{level}.attentions.{layer}", width, depth, config)
            skips.append(width)
            channels = width
        if level < len(widths) - 1:
            shapes |= _conv(f"down_blocks.{level}.downsamplers.0.conv", width, width)
            skips.append(width)

    for layer in range(2 if config.mid_depth else 1):
        shapes |= _resnet(f"mid_block.resnets.{layer}", channels, channels, time_width)
    if config.mid_depth:
        shapes |= _transformer("mid_block.attentions.0", channels, config.mid_depth, config)

    for level, width in enumerate(reversed(widths)):
        for layer, depth in enumerate(config.up_depths[level]):
            shapes |= _resnet(f"up_blocks.{level}.resnets.{layer}", channels + skips.pop(), width, time_width)
            if depth:
                shapes |= _transformer(f"up_blocks.{level}.attentions.{layer}", width, depth, config)
            channels = width
        if level < len(widths) - 1:
            shapes |= _conv(f"up_blocks.{level}.upsamplers.0.conv", width, width)
    return shapes | _norm("conv_norm_out", channels) | _conv("conv_out", channels, config.out_channels)


def vae_shapes(config: VAEConfig) -> Shapes:
    """Every tensor of `VAE(config)`: 248 for Stable Diffusion 1.x."""
    widths, layers, latent = config.block_out_channels, config.layers_per_block, config.latent_channels
    shapes = _conv("quant_conv", 2 * latent, 2 * latent, 1) | _conv("post_quant_conv", latent, latent, 1)

    shapes |= _conv("encoder.conv_in", config.in_channels, widths[0])
    channels = widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            shapes |= _resnet(f"encoder.down_blocks.{level}.resnets.{layer}", channels, width)
            channels = width
        if level < len(widths) - 1:
            shapes |= _conv(f"encoder.down_blocks.{level}.downsamplers.0.conv", width, width)
    shapes |= _vae_middle("encoder", channels, config)
    shapes |= _norm("encoder.conv_norm_out", channels) | _conv("encoder.conv_out", channels, 2 * latent)

    shapes |= _conv("decoder.conv_in", latent, channels) | _vae_middle("decoder", channels, config)
    for level, width in enumerate(reversed(widths)):
        for layer in range(layers + 1):
            shapes |= _resnet(f"decoder.up_blocks.{level}.resnets.{layer}", channels, width)
            channels = width
        if level < len(widths) - 1:
            shapes |= _conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", width, width)
    return shapes | _norm("decoder.conv_norm_out", channels) | _conv("decoder.conv_out", channels, config.out_channels)


def text_shapes(config: TextConfig) -> Shapes:
    """Every tensor of the CLIP text model: 196 for Stable Diffusion 1.x, 372 for 2.x, 196 and 517 for XL."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (config.vocab_size, width),
        "embeddings.position_embedding.weight": (config.max_position_embeddings, width),
    }
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{name}.self_attn.{projection}", width, width)
        shapes |= _linear(f"{name}.mlp.fc1", width, inner) | _linear(f"{name}.mlp.fc2", inner, width)
        shapes |= _norm(f"{name}.layer_norm1", width) | _norm(f"{name}.layer_norm2", width)
    if config.projection_dim:
        shapes["text_projection.weight"] = (config.projection_dim, width)
    return shapes | _norm("final_layer_norm", width)


def vae_attention_modules(config: VAEConfig) -> Iterator[str]:
    """The linear layers that LDM files store as 1x1 convolutions, [C, C, 1, 1] for our [C, C]."""
    if config.mid_block_add_attention:
        for half in ("encoder", "decoder"):
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                yield f"{half}.mid_block.attentions.0.{projection}"


def expected_shapes(config: Config) -> Shapes:
    """Every tensor of the network that `config` describes."""
    if isinstance(config, UNetConfig):
        return unet_shapes(config)
    return vae_shapes(config) if isinstance(config, VAEConfig) else text_shapes(config)


def check_part(part: str, found: Mapping[str, TensorInfo], config: Config, source: str) -> None:
    """Hold one part against its config: dtypes, then names both ways and shapes; InputError if it differs."""
    for name, info in found.items():
        if info.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{source}: {part} tensor {quoted(name, 80)} is {info.dtype}; weights are read from "
                f"{', '.join(FLOAT_DTYPES)}, so use an fp32, fp16 or bf16 file"
            )
    wanted = expected_shapes(config)
    as_conv = {f"{module}.weight" for module in vae_attention_modules(config)} if isinstance(config, VAEConfig) else ()
    wrong = [
        f"{quoted(name, 80)} is {list(found[name].shape)}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
        if not (name in as_conv and found[name].shape == (*shape, 1, 1))
    ]
    missing = [quoted(name, 80) for name in wanted if name not in found]
    unexpected = [quoted(name, 80) for name in found if name not in wanted]
    faults = [
        f"{len(items)} {what} ({', '.join(items[:5])}{', ...' if len(items) > 5 else ''})"
        for what, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if items
    ]
    if faults:
        advice = "use an unmodified checkpoint with its own configs"
        if part == "unet" and len(missing) > _MANY:
            advice = "if it was pruned or distilled (like small-sd), pass its diffusers folder, whose config says how"
        raise InputError(f"{source}: the {part} tensors do not fit {_described(config)}: {'; '.join(faults)}; {advice}")


def _described(config: Config) -> str:
    families = [family_of(config)] if isinstance(config, UNetConfig) else FAMILIES
    titles = [family.title for family in families if family and config in family.configs.values()]
    return titles[0] if titles else "their config.json"


def _vae_middle(half: str, width: int, config: VAEConfig) -> Shapes:
    shapes = _resnet(f"{half}.mid_block.resnets.0", width, width)
    shapes |= _resnet(f"{half}.mid_block.resnets.1", width, width)
    if config.mid_block_add_attention:
        shapes |= _norm(f"{half}.mid_block.attentions.0.group_norm", width)
        for module in vae_attention_modules(config):
            if module.startswith(half):
                shapes |= _linear(module, width, width)
    return shapes


def _resnet(name: str, channels: int, width: int, time_width: int | None = None) -> Shapes:
    shapes = _norm(f"{name}.norm1", channels) | _conv(f"{name}.conv1", channels, width)
    shapes |= _norm(f"{name}.norm2", width) | _conv(f"{name}.conv2", width, width)
    if time_width is not None:
        shapes |= _linear(f"{name}.time_emb_proj", time_width, width)
    if channels != width:
        shapes |= _conv(f"{name}.conv_shortcut", channels, width, 1)
    return shapes


def _transformer(name: str, width: int, depth: int, config: UNetConfig) -> Shapes:
    project = _linear if config.use_linear_projection else _conv1x1
    shapes = _norm(f"{name}.norm", width) | project(f"{name}.proj_in", width, width)
    for layer in range(depth):
        shapes |= _transformer_block(f"{name}.transformer_blocks.{layer}", width, config)
    return shapes | project(f"{name}.proj_out", width, width)


def _transformer_block(block: str, width: int, config: UNetConfig) -> Shapes:
    shapes: Shapes = {}
    for attention, context_width in (("attn1", width), ("attn2", config.cross_attention_dim)):
        shapes[f"{block}.{attention}.to_q.weight"] = (width, width)
        shapes[f"{block}.{attention}.to_k.weight"] = (width, context_width)
        shapes[f"{block}.{attention}.to_v.weight"] = (width, context_width)
        shapes |= _linear(f"{block}.{attention}.to_out.0", width, width)
    shapes |= _linear(f"{block}.ff.net.0.proj", width, 8 * width) | _linear(f"{block}.ff.net.2", 4 * width, width)
    return shapes | _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width) | _norm(f"{block}.norm3", width)


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _conv1x1(name: str, inputs: int, outputs: int) -> Shapes:
    return _conv(name, inputs, outputs, 1)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

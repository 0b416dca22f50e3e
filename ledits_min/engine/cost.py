"""What a network costs, from its config alone: parameters, floating-point operations and memory of one sample.

A multiply-add counts as two operations. Norms, activations and sums are left out: they are a thousandth of the total.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ledits_min.config import UNetConfig, VAEConfig
from ledits_min.engine import winograd


@dataclass(frozen=True)
class Cost:
    """One evaluation of one sample.

    conv, linear, attention  operations a kind
    text                     operations on the text alone, which an evaluation finds done
    values                   numbers that are alive at the worst moment, parameters aside
    transformed              numbers of the weights in `winograd`'s form, where a device wants them
    """

    parameters: int
    conv: int
    linear: int
    attention: int
    text: int
    values: int
    transformed: int

    @property
    def flop(self) -> int:
        return self.conv + self.linear + self.attention


@dataclass
class _Tally:
    """Layers are added in the order the network runs them; height and width follow the map."""

    height: int
    width: int
    parameters: int = 0
    conv: int = 0
    linear: int = 0
    attention: int = 0
    text: int = 0
    values: int = 0
    transformed: int = 0
    skips: list[int] = field(default_factory=list)  # channels of what is kept for the way up
    held: int = 0  # values of the same

    @property
    def area(self) -> int:
        return self.height * self.width

    def total(self) -> Cost:
        return Cost(self.parameters, self.conv, self.linear, self.attention, self.text, self.values, self.transformed)

    def add_conv(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        self.parameters += inputs * outputs * kernel**2 + outputs
        self.conv += 2 * inputs * outputs * kernel**2 * self.area

    def add_linear(self, inputs: int, outputs: int, rows: int, bias: bool = True) -> None:
        self.parameters += inputs * outputs + bias * outputs
        self.linear += 2 * inputs * outputs * rows

    def add_text(self, inputs: int, outputs: int, tokens: int) -> None:
        self.parameters += inputs * outputs
        self.text += 2 * inputs * outputs * tokens

    def add_norm(self, width: int) -> None:
        self.parameters += 2 * width

    def add_attention(self, width: int, keys: int) -> None:
        self.attention += 4 * width * self.area * keys

    def resnet(self, inputs: int, outputs: int, time_width: int = 0) -> None:
        for width in (inputs, outputs):
            if winograd.pays(width, outputs, self.height, self.width):
                self.transformed += 16 * width * outputs
        self.add_norm(inputs)
        self.add_conv(inputs, outputs)
        if time_width:
            self.add_linear(time_width, outputs, rows=1)
        self.add_norm(outputs)
        self.add_conv(outputs, outputs)
        if inputs != outputs:
            self.add_conv(inputs, outputs, 1)
        shortcut = outputs if inputs != outputs else 0
        # The block's own input, the resnet's and its shortcut; and around a convolution what goes in, what comes out,
        # what is being normalised.
        self.need(2 * inputs + shortcut + max(2 * inputs, inputs + outputs, 3 * outputs))

    def need(self, channels: float) -> None:
        """So many channels of the current map are alive, besides what is kept for the way up."""
        self.values = max(self.values, self.held + round(channels * self.area))

    def keep(self, channels: int) -> None:
        self.skips.append(channels)
        self.held += channels * self.area

    def take(self) -> int:
        channels = self.skips.pop()
        self.held -= channels * self.area
        return channels

    def resize(self, height: int, width: int) -> None:
        self.height, self.width = height, width


def unet_cost(config: UNetConfig, height: int, width: int, tokens: int = 77) -> Cost:
    """The UNet on latents (height, width) with a context of `tokens`; the walk of `UNet.__init__` and `forward`."""
    tally = _Tally(height, width)
    widths = config.block_out_channels
    time_width, last = 4 * widths[0], len(widths) - 1
    for inputs in (widths[0], config.projection_class_embeddings_input_dim):
        if inputs:
            tally.add_linear(inputs, time_width, rows=1)
            tally.add_linear(time_width, time_width, rows=1)

    sizes = [(height, width)]
    tally.add_conv(config.in_channels, widths[0])
    tally.keep(channels := widths[0])
    for level, outputs in enumerate(widths):
        for depth in config.down_depths[level]:
            tally.resnet(channels, outputs, time_width)
            if depth:
                _transformer(tally, outputs, depth, tokens, config)
            tally.keep(channels := outputs)
        if level < last:
            tally.resize(-(-tally.height // 2), -(-tally.width // 2))
            sizes.append((tally.height, tally.width))
            tally.add_conv(channels, channels)
            tally.keep(channels)

    tally.resnet(channels, channels, time_width)
    if config.mid_depth:
        _transformer(tally, channels, config.mid_depth, tokens, config)
        tally.resnet(channels, channels, time_width)

    for level in reversed(range(len(widths))):
        outputs = widths[level]
        for depth in config.up_depths[last - level]:
            tally.resnet(channels + tally.take(), outputs, time_width)
            channels = outputs
            if depth:
                _transformer(tally, outputs, depth, tokens, config)
        if level:
            tally.resize(*sizes[level - 1])
            tally.add_conv(channels, channels)
            tally.need(2.25 * channels)
    tally.add_norm(channels)
    tally.add_conv(channels, config.out_channels)
    return tally.total()


def _transformer(tally: _Tally, width: int, depth: int, tokens: int, config: UNetConfig) -> None:
    def add_projection() -> None:
        if config.use_linear_projection:
            tally.add_linear(width, width, tally.area)
        else:
            tally.add_conv(width, width, 1)

    tally.add_norm(width)
    add_projection()
    for _ in range(depth):
        tally.add_norm(width)
        tally.add_linear(width, 3 * width, tally.area, bias=False)
        tally.add_attention(width, tally.area)
        tally.add_linear(width, width, tally.area)

        tally.add_norm(width)
        tally.add_linear(width, width, tally.area, bias=False)
        tally.add_text(config.cross_attention_dim, 2 * width, tokens)
        tally.add_attention(width, tokens)
        tally.add_linear(width, width, tally.area)

        tally.add_norm(width)
        tally.add_linear(width, 8 * width, tally.area)
        tally.add_linear(4 * width, width, tally.area)
    add_projection()
    # Residual, tokens and their norm stand beside the gated unit: [value, gate], gelu(gate), and their product.
    tally.need((3 + 8 + 4 + 4) * width)


def vae_costs(config: VAEConfig, height: int, width: int) -> tuple[Cost, Cost]:
    """Encoding and decoding one picture whose latents are (height, width)."""
    widths, layers, last = config.block_out_channels, config.layers_per_block, len(config.block_out_channels) - 1

    encoder = _Tally(height * config.factor, width * config.factor)
    encoder.add_conv(config.in_channels, widths[0])
    channels = widths[0]
    for level, outputs in enumerate(widths):
        for _ in range(layers):
            encoder.resnet(channels, outputs)
            channels = outputs
        if level < last:
            encoder.resize(encoder.height // 2, encoder.width // 2)
            encoder.add_conv(channels, channels)
    _vae_middle(encoder, channels, config)
    encoder.add_norm(channels)
    encoder.add_conv(channels, 2 * config.latent_channels)
    encoder.add_conv(2 * config.latent_channels, 2 * config.latent_channels, 1)

    decoder = _Tally(height, width)
    decoder.add_conv(config.latent_channels, config.latent_channels, 1)
    decoder.add_conv(config.latent_channels, channels)
    _vae_middle(decoder, channels, config)
    for level, outputs in enumerate(reversed(widths)):
        for _ in range(layers + 1):
            decoder.resnet(channels, outputs)
            channels = outputs
        if level < last:
            decoder.resize(decoder.height * 2, decoder.width * 2)
            decoder.add_conv(channels, channels)
            decoder.need(2.25 * channels)
    decoder.add_norm(channels)
    decoder.add_conv(channels, config.out_channels)
    return encoder.total(), decoder.total()


def _vae_middle(tally: _Tally, width: int, config: VAEConfig) -> None:
    tally.resnet(width, width)
    if config.mid_block_add_attention:
        tally.add_norm(width)
        for _ in range(4):
            tally.add_linear(width, width, tally.area)
        tally.add_attention(width, tally.area)
    tally.resnet(width, width)

"""Models with random weights, made where they run: for measuring speed and memory without a checkpoint.

Sizes, formats and tensors are those of a real model; the values are drawn so that activations keep a size of
about 1 through every layer, neither saturating their grids nor vanishing. Its text means nothing.
"""

import math

import torch

from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.model.weights import BlockWeights, LinearWeights, ModelWeights, SiteScales
from qmamba_cli.quant.weights import DEFAULT_GROUP_SIZE, MULTIPLIER_MAX

# Root mean squares of uniform draws: int8 values, and 4-bit codes times multipliers of 1 ... 15.
_INT8_RMS = 73.9
_INT4_RMS = 42.0
# Largest values that the grids hold, a few times what the activations are.
_SCALES = SiteScales(
    in_proj_input=5.0 / 127,
    in_proj_output=6.0 / 127,
    x_proj_input=5.0 / 127,
    x_proj_output=4.0 / 127,
    dt_proj_output=4.0 / 127,
    ssm_state=1.0 / 127,
    out_proj_input=4.0 / 127,
)
# Step sizes of a fresh model, as in state-spaces/mamba.
_LEAST_STEP, _LARGEST_STEP = 1e-3, 1e-1


def random_quantized(
    config: MambaConfig, w_bits: int, device: torch.device, seed: int, *, group_size: int = DEFAULT_GROUP_SIZE
) -> ModelWeights:
    """A quantized model as `quantize.quantized_model` returns it: packed on a GPU, expanded on a CPU.

    Args:
        config: sizes.
        w_bits: bits of in_proj and out_proj, 4 or 8.
        device: where the tensors are made; the host holds none of them.
        seed: of the values; the same arguments give the same model on the same device.
        group_size: of the W4 matrices.
    """
    draw = _Draw(device, seed)
    packed = device.type == "cuda"
    width, d = config.d_model, config.d_inner

    def projection(rows: int, columns: int, *, has_bias: bool, gain: float = 1.0) -> LinearWeights:
        bias = draw.normal(rows, std=0.02) if has_bias else None
        if w_bits == 8:
            linear = draw.int8(rows, columns, gain)
            return LinearWeights(linear.weight, linear.scale, bias)
        weight = PackedInt4(
            codes=draw.integers(0, 256, (rows, -(-columns // 2)), torch.uint8),
            multiplier=draw.integers(1, MULTIPLIER_MAX + 1, (rows, -(-columns // group_size)), torch.uint8),
            group_size=group_size,
            columns=columns,
        )
        scale = draw.constant(rows, gain / (_INT4_RMS * math.sqrt(columns)))
        return LinearWeights(weight if packed else weight.expand(), scale, bias)

    def block() -> BlockWeights:
        taps = draw.int8(d, config.d_conv, 1.0)
        return BlockWeights(
            norm=None,
            in_proj=projection(2 * d, width, has_bias=config.proj_bias),
            conv_weight=taps.matrix,
            conv_scale=taps.scale,
            conv_bias=draw.normal(d, std=0.02) if config.conv_bias else None,
            x_proj=draw.int8(config.dt_rank + 2 * config.d_state, d, 1.0),
            dt_proj=draw.int8(d, config.dt_rank, 1.0),
            dt_bias=draw.step_bias(d),
            A=_decay(config, device),
            D=draw.constant(d, 1.0),
            out_proj=projection(width, d, has_bias=config.proj_bias, gain=_depth_gain(config)),
            rotated=True,
            scales=_SCALES,
        )

    blocks = tuple(block() for _ in range(config.n_layer))
    if not packed:
        return ModelWeights(
            config=config,
            embedding=draw.normal(config.vocab_size, width),
            blocks=blocks,
            norm_f=None,
            lm_head=LinearWeights(draw.normal(config.vocab_size, width, std=width**-0.5)),
        )
    # Rows of length about sqrt(d_model), as the residual's.
    table = draw.int8(config.vocab_size, width, math.sqrt(width))
    assert table.scale is not None
    return ModelWeights(
        config=config,
        embedding=table.matrix,
        blocks=blocks,
        # A tied head has the rows of the embedding: this keeps logits at about 1.
        norm_f=draw.constant(width, width**-0.5),
        lm_head=table if config.tie_embeddings else draw.int8(config.vocab_size, width, math.sqrt(width)),
        embedding_scale=table.scale,
        rotate_ends=True,
    )


def random_float(
    config: MambaConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> ModelWeights:
    """A float model in its trained basis, as `prepare.float_model` returns it with ``rotate=False``.

    Args:
        config: sizes.
        dtype: of the projections, the embedding and the head.
        device: where the tensors are made; the host holds none of them.
        seed: of the values.
    """
    draw = _Draw(device, seed)
    width, d = config.d_model, config.d_inner

    def projection(rows: int, columns: int, *, has_bias: bool = False, gain: float = 1.0) -> LinearWeights:
        weight = draw.normal(rows, columns, std=gain * columns**-0.5, dtype=dtype)
        return LinearWeights(weight, bias=draw.normal(rows, std=0.02) if has_bias else None)

    def block() -> BlockWeights:
        return BlockWeights(
            norm=draw.constant(width, 1.0),
            in_proj=projection(2 * d, width, has_bias=config.proj_bias),
            conv_weight=draw.normal(d, config.d_conv, std=config.d_conv**-0.5),
            conv_scale=None,
            conv_bias=draw.normal(d, std=0.02) if config.conv_bias else None,
            x_proj=projection(config.dt_rank + 2 * config.d_state, d),
            dt_proj=projection(d, config.dt_rank),
            dt_bias=draw.step_bias(d),
            A=_decay(config, device),
            D=draw.constant(d, 1.0),
            out_proj=projection(width, d, has_bias=config.proj_bias, gain=_depth_gain(config)),
            rotated=False,
            scales=SiteScales(),
        )

    blocks = tuple(block() for _ in range(config.n_layer))
    table = draw.normal(config.vocab_size, width, dtype=dtype)
    return ModelWeights(
        config=config,
        embedding=table,
        blocks=blocks,
        norm_f=draw.constant(width, width**-0.5),
        lm_head=LinearWeights(
            table if config.tie_embeddings else draw.normal(config.vocab_size, width, dtype=dtype)
        ),
    )


def _depth_gain(config: MambaConfig) -> float:
    """What each block's output is multiplied by, so that all together add about as much as the embedding."""
    return 1.0 / math.sqrt(config.n_layer)


def _decay(config: MambaConfig, device: torch.device) -> torch.Tensor:
    """A of a fresh model: -1 ... -n in every channel."""
    row = -torch.arange(1, config.d_state + 1, dtype=torch.float32, device=device)
    return row.expand(config.d_inner, -1).contiguous()


class _Draw:
    """Seeded tensors on one device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self._generator, device=self._device, dtype=dtype)

    def int8(self, rows: int, columns: int, gain: float) -> LinearWeights:
        """A matrix that multiplies the size of what it reads by ``gain``, and its row scales."""
        weight = self.integers(-127, 128, (rows, columns), torch.int8)
        return LinearWeights(weight, self.constant(rows, gain / (_INT8_RMS * math.sqrt(columns))))

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=dtype).mul_(std)

    def constant(self, size: int, value: float) -> torch.Tensor:
        return torch.full((size,), value, device=self._device)

    def step_bias(self, size: int) -> torch.Tensor:
        """dt_bias whose softplus is drawn evenly in the logarithm of the step."""
        drawn = torch.rand(size, generator=self._generator, device=self._device)
        low, high = math.log(_LEAST_STEP), math.log(_LARGEST_STEP)
        step = torch.exp(low + drawn * (high - low))
        return step + torch.log(-torch.expm1(-step))

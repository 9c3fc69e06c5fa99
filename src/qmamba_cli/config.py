"""Architecture of a Mamba-1 language model and the tensors it is made of.

Letters used everywhere: ``b`` batch, ``l`` length, ``d`` d_inner, ``n`` d_state, ``w`` d_conv, ``r`` dt_rank.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from qmamba_cli.errors import CheckpointError

# Far beyond any model, and near enough that a loop over the layers ends at once.
_MAX_LAYERS = 1 << 12
_MAX_SIZE = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig:
    """Sizes and switches of a Mamba-1 language model.

    Attributes:
        d_model: width of the residual stream.
        n_layer: number of blocks.
        vocab_size: rows of the embedding, padding rows included.
        d_state: n, states a channel.
        d_conv: w, taps of the causal convolution, 2 to 4.
        d_inner: d, channels inside a block (``expand * d_model``).
        dt_rank: r, rank of the step-size projection.
        norm_eps: epsilon of every RMSNorm.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether in_proj and out_proj have biases.
        tie_embeddings: whether lm_head shares the embedding's weight.
        bos_token_id: beginning of text, or None.
        eos_token_id: end of text, or None.

    Raises:
        CheckpointError: a size is not positive or a width is not supported.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int
    d_conv: int
    d_inner: int
    dt_rank: int
    norm_eps: float = 1e-5
    conv_bias: bool = True
    proj_bias: bool = False
    tie_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        # A configuration may come from anyone: what follows loops over layers and multiplies sizes.
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_inner", "dt_rank"):
            value, largest = getattr(self, name), _MAX_LAYERS if name == "n_layer" else _MAX_SIZE
            if type(value) is not int or not 1 <= value <= largest:
                raise CheckpointError(
                    f"config: `{name}` must be an integer from 1 to {largest}, got {value!r}"
                )
        if type(self.d_conv) is not int or not 2 <= self.d_conv <= 4:
            raise CheckpointError(f"config: `d_conv` must be 2, 3 or 4, got {self.d_conv!r}")
        if type(self.norm_eps) not in (int, float) or not 0.0 <= self.norm_eps < 1.0:
            raise CheckpointError(f"config: `norm_eps` must lie in [0, 1), got {self.norm_eps!r}")
        for name in ("conv_bias", "proj_bias", "tie_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise CheckpointError(f"config: `{name}` must be true or false, got {getattr(self, name)!r}")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= _MAX_SIZE):
                raise CheckpointError(f"config: `{name}` must be a token id or null, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in field order."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MambaConfig":
        """Inverse of `to_dict`; unknown keys are refused.

        Raises:
            CheckpointError: a key is unknown or missing, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(f"config: unknown keys {unknown}, expected a subset of {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"config: {error}") from None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the float checkpoint, Hugging Face's names, in layer order.

        A tied lm_head is not listed.
        """
        shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (self.vocab_size, self.d_model)}
        for i in range(self.n_layer):
            mixer = f"backbone.layers.{i}.mixer"
            shapes[f"backbone.layers.{i}.norm.weight"] = (self.d_model,)
            shapes[f"{mixer}.in_proj.weight"] = (2 * self.d_inner, self.d_model)
            if self.proj_bias:
                shapes[f"{mixer}.in_proj.bias"] = (2 * self.d_inner,)
            shapes[f"{mixer}.conv1d.weight"] = (self.d_inner, 1, self.d_conv)
            if self.conv_bias:
                shapes[f"{mixer}.conv1d.bias"] = (self.d_inner,)
            shapes[f"{mixer}.x_proj.weight"] = (self.dt_rank + 2 * self.d_state, self.d_inner)
            shapes[f"{mixer}.dt_proj.weight"] = (self.d_inner, self.dt_rank)
            shapes[f"{mixer}.dt_proj.bias"] = (self.d_inner,)
            shapes[f"{mixer}.A_log"] = (self.d_inner, self.d_state)
            shapes[f"{mixer}.D"] = (self.d_inner,)
            shapes[f"{mixer}.out_proj.weight"] = (self.d_model, self.d_inner)
            if self.proj_bias:
                shapes[f"{mixer}.out_proj.bias"] = (self.d_model,)
        shapes["backbone.norm_f.weight"] = (self.d_model,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.d_model)
        return shapes

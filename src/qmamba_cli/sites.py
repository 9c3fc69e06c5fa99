"""The eight places whose activations are observed and given a scale.

One row a site; calibration, export and the block take the names from here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class ObserverKind(StrEnum):
    """How a site's absmax is chosen from what was observed."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    LEAST_ERROR = "least-error"


class Basis(StrEnum):
    """Whether a site's values are seen before or after the Hadamard rotation."""

    PLAIN = "plain"
    ROTATED = "rotated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One observed tensor.

    Attributes:
        name: the module and the side of it, as in ``x_proj:input``.
        tensor: what the tensor is, with its shape.
        basis: plain or rotated.
        observer: MinMax, or Percentile where rare large values would waste the grid.
        per_layer: one scale a layer, or one for the model.
    """

    name: str
    tensor: str
    basis: Basis
    observer: ObserverKind
    per_layer: bool = True


IN_PROJ_INPUT = "in_proj:input"
IN_PROJ_OUTPUT = "in_proj:output"
X_PROJ_INPUT = "x_proj:input"
X_PROJ_OUTPUT = "x_proj:output"
DT_PROJ_OUTPUT = "dt_proj:output"
SSM_STATE = "ssm_state_act:input"
OUT_PROJ_INPUT = "out_proj:input"
LM_HEAD_INPUT = "lm_head:input"

_ROWS = (
    Site(
        name=IN_PROJ_INPUT,
        tensor="RMSNorm output (b, l, d_model)",
        basis=Basis.ROTATED,
        observer=ObserverKind.MINMAX,
    ),
    Site(name=IN_PROJ_OUTPUT, tensor="x and z (b, l, 2d)", basis=Basis.PLAIN, observer=ObserverKind.MINMAX),
    Site(
        name=X_PROJ_INPUT,
        tensor="SiLU(conv), u (b, l, d)",
        basis=Basis.PLAIN,
        observer=ObserverKind.PERCENTILE,
    ),
    Site(
        name=X_PROJ_OUTPUT,
        tensor="dt_low, B, C (b, l, r+2n)",
        basis=Basis.PLAIN,
        observer=ObserverKind.MINMAX,
    ),
    Site(
        name=DT_PROJ_OUTPUT,
        tensor="dt before its bias (b, l, d)",
        basis=Basis.PLAIN,
        observer=ObserverKind.MINMAX,
    ),
    Site(
        name=SSM_STATE,
        tensor="scan state at chunk ends and at the last token (b, d, n)",
        basis=Basis.PLAIN,
        observer=ObserverKind.PERCENTILE,
    ),
    Site(
        name=OUT_PROJ_INPUT,
        tensor="rotated scan output F(y) (b, l, d)",
        basis=Basis.ROTATED,
        observer=ObserverKind.MINMAX,
    ),
    Site(
        name=LM_HEAD_INPUT,
        tensor="norm_f output (b, l, d_model)",
        basis=Basis.ROTATED,
        observer=ObserverKind.MINMAX,
        per_layer=False,
    ),
)

SITES: Mapping[str, Site] = MappingProxyType({row.name: row for row in _ROWS})


def site_key(name: str, layer: int | None) -> str:
    """The key of one site's statistics in the calibration artifact.

    >>> site_key("x_proj:input", 3), site_key("lm_head:input", None)
    ('layers.3.x_proj:input', 'lm_head:input')
    """
    return name if layer is None else f"layers.{layer}.{name}"


def site_keys(n_layer: int) -> tuple[str, ...]:
    """Every key of a model with ``n_layer`` blocks, layer by layer, the model-wide ones last."""
    per_layer = [row.name for row in _ROWS if row.per_layer]
    keys = [site_key(name, layer) for layer in range(n_layer) for name in per_layer]
    return (*keys, *(row.name for row in _ROWS if not row.per_layer))

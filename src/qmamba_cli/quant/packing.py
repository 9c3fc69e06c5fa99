"""Two 4-bit values a byte: signed weight codes and unsigned group multipliers.

    byte j of a row  =  value[2j + 1] << 4  |  value[2j]       value: 4 bits, two's complement if signed

Even indices take the low nibble, odd ones the high nibble; each row is packed by itself, and a row of odd
width ends in a zero high nibble.
"""

import torch

from qmamba_cli.errors import ShapeError


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack signed codes.

    >>> pack_int4(torch.tensor([[1, -1, -8]], dtype=torch.int8)).tolist()
    [[241, 8]]

    Args:
        codes: (rows, k) int8 in [-8, 7].

    Returns:
        (rows, ceil(k / 2)) uint8.

    Raises:
        ShapeError: the shape, dtype or range is not as above.
    """
    _check(codes, torch.int8, -8, 7)
    return _pack(codes.contiguous().view(torch.uint8) & 0xF)


def unpack_int4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Inverse of `pack_int4`.

    Args:
        packed: (rows, ceil(k / 2)) uint8.
        k: codes a row.

    Returns:
        (rows, k) int8 in [-8, 7].

    Raises:
        ShapeError: the shape or dtype is not as above, or a padding nibble is not zero.
    """
    # (n ^ 8) - 8 extends the sign of the nibble n.
    return (_unpack(packed, k).view(torch.int8) ^ 8) - 8


def pack_uint4(values: torch.Tensor) -> torch.Tensor:
    """Pack unsigned values.

    >>> pack_uint4(torch.tensor([[1, 15, 7]], dtype=torch.uint8)).tolist()
    [[241, 7]]

    Args:
        values: (rows, k) uint8 in [0, 15].

    Returns:
        (rows, ceil(k / 2)) uint8.

    Raises:
        ShapeError: the shape, dtype or range is not as above.
    """
    _check(values, torch.uint8, 0, 15)
    return _pack(values)


def unpack_uint4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Inverse of `pack_uint4`.

    Args:
        packed: (rows, ceil(k / 2)) uint8.
        k: values a row.

    Returns:
        (rows, k) uint8 in [0, 15].

    Raises:
        ShapeError: the shape or dtype is not as above, or a padding nibble is not zero.
    """
    return _unpack(packed, k)


def _check(values: torch.Tensor, dtype: torch.dtype, low: int, high: int) -> None:
    if values.ndim != 2 or values.dtype != dtype:
        raise ShapeError(
            f"4-bit packing: wrong tensor, got {values.dtype} of shape {tuple(values.shape)}, "
            f"expected {dtype} (rows, k)"
        )
    if values.numel():
        smallest, largest = (int(end) for end in values.aminmax())
        if smallest < low or largest > high:
            raise ShapeError(
                f"4-bit packing: value out of range, got values in [{smallest}, {largest}], "
                f"expected [{low}, {high}]"
            )


def _pack(nibbles: torch.Tensor) -> torch.Tensor:
    low, high = nibbles[:, 0::2], nibbles[:, 1::2]
    packed = low.clone(memory_format=torch.contiguous_format)
    packed[:, : high.shape[1]] |= high << 4
    return packed


def _unpack(packed: torch.Tensor, k: int) -> torch.Tensor:
    if packed.ndim != 2 or packed.dtype != torch.uint8 or k < 0 or packed.shape[1] != (k + 1) // 2:
        raise ShapeError(
            f"4-bit unpacking: wrong tensor, got {packed.dtype} of shape {tuple(packed.shape)}, "
            f"expected {torch.uint8} (rows, {(k + 1) // 2}) for {k} values a row"
        )
    values = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.uint8, device=packed.device)
    values[:, 0::2] = packed & 0xF
    values[:, 1::2] = packed >> 4
    if k % 2 and bool(values[:, k].any()):
        raise ShapeError(f"4-bit unpacking: padding must be zero, got a value in column {k} of {k} columns")
    return values[:, :k].contiguous()

"""Matrix product with per-row scales: int8 x int8 with exact int32 sums, or float."""

"""Float to the int8 grid and back, elementwise or with one scale a token."""

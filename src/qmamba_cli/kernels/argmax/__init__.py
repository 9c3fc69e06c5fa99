"""Where the largest value of a row is."""

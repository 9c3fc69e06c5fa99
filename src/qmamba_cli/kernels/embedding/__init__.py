"""Rows of an embedding table, and the way back from the rotated basis to the table's."""

"""Selective state-space scan with the step-size softplus, the D skip and the z gate inside."""

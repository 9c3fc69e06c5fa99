"""The two ends of a decode step: from tokens to the residual, and from the residual to tokens."""

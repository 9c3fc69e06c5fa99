"""The Mamba language model: weights, one block driven by columns, the model, generation."""

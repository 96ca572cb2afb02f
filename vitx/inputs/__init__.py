"""Inputs: files, pictures, arrays and clips become tensors, as the model declares its preprocessing."""

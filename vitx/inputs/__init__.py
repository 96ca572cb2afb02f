"""Inputs: files, pictures, arrays and clips, converted to tensors as the model declares."""

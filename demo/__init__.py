"""Data and weights of the demo: handwritten digits hidden in clutter."""

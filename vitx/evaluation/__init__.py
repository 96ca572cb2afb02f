"""Evaluation of maps: by their own statistics, by perturbing images, and by randomizing the model."""

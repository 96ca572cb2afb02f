"""Judgments of maps: by numbers of their own, by perturbing images, and by randomizing the model."""

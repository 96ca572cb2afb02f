"""What maps and models are put to: taking patches away, and where a model has its parameters.

Nothing here draws.
"""

"""Models: how they are loaded, run and left unchanged, with their classes and outputs.

Nothing here depends on attention.
"""

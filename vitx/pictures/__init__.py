"""Drawing: heat maps, overlays, strips, grids, captions and colours.

Nothing here runs a model.
"""

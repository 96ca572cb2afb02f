"""Drawing: heat maps, overlays, strips, grids, captions and colours; nothing here runs a model."""

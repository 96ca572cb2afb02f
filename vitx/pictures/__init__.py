"""Drawing: heat maps, overlays, strips, grids, captions and colors; nothing here runs a model."""

"""Where drawing was in 0.1; it is in `vitx.pictures.render` now."""

from vitx.pictures.render import beside, grid, heatmaps, overlays, signed_overlays, stamp

__all__ = ["beside", "grid", "heatmaps", "overlays", "signed_overlays", "stamp"]

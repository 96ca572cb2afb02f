"""Where captions were in 0.1; they are in `vitx.pictures.captions` now."""

from vitx.pictures.captions import Caption, captions_of

__all__ = ["Caption", "captions_of"]

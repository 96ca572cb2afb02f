"""A page to click: which patch looks where, in which layer, by which head."""

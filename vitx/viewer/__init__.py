"""An interactive page: which patch looks where, in which layer, by which head."""

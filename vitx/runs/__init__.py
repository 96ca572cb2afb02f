"""What a run of training left behind, read and played back.

The names here are those that the callback writes under.
"""

FOLDER = "vitx"  # in the log folder of a run
GRIDS = "vitx/maps"  # the tag of the pictures, in any logger

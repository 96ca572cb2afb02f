"""The files of a training run, written, read and played back, and the names that they have."""

FOLDER = "vitx"  # in the folder of a run
FACTS, NUMBERS = "run.json", "numbers.csv"  # in it, beside images-STEP.npz and firing-STEP.npz
IMAGES, FIRING = "images", "firing"
LOGITS, SINKS = "logits", "sinks"  # in a firing, beside the maps of each method
GRIDS = "vitx/maps"  # the tag of the pictures, in any logger
OVERVIEW = "vitx/overview"  # that of the one at the end

"""Files of a training run: writing, reading and playing them back, and their names."""

FOLDER = "vitx"  # in the folder of a run
FACTS, NUMBERS = "run.json", "numbers.csv"  # in that folder, with images-STEP.npz and firing-STEP.npz
IMAGES, FIRING = "images", "firing"
LOGITS, SINKS = "logits", "sinks"  # in a firing, with the maps of each method
GRIDS = "vitx/maps"  # the tag of the pictures, in any logger
OVERVIEW = "vitx/overview"  # the tag of the picture at the end

"""Metrics of what a map shows, and of how much the model needs it, with one value per image.

They take (maps, masks) as torchmetrics takes (preds, target), on any device. For a data set, take `.mean()`.
"""

from vitx.evaluation.faithfulness import faithfulness as faithfulness
from vitx.evaluation.faithfulness import reliance as reliance
from vitx.evaluation.metrics import box_masks as box_masks
from vitx.evaluation.metrics import drift as drift
from vitx.evaluation.metrics import energy_inside as energy_inside
from vitx.evaluation.metrics import entropy as entropy
from vitx.evaluation.metrics import information as information
from vitx.evaluation.metrics import mean_iou as mean_iou
from vitx.evaluation.metrics import pointing_game as pointing_game
from vitx.evaluation.metrics import rank_correlation as rank_correlation
from vitx.evaluation.perturbation import deletion as deletion
from vitx.evaluation.perturbation import insertion as insertion
from vitx.evaluation.perturbation import perturbation as perturbation

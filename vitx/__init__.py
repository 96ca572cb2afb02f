"""vitx: see what a Vision Transformer looks at, while it learns.

    import vitx

    explanation = vitx.explain(model, images, "grad_rollout")
    pictures = explanation.overlays(images, mean, std)

During training: `from vitx.callbacks import RolloutCallback`.
"""

from vitx.capture import capture
from vitx.errors import VitxError
from vitx.explain import explain, explain_methods
from vitx.explanation import Explanation
from vitx.flow import attention_flow
from vitx.methods import methods
from vitx.randomisation import Sanity, sanity
from vitx.rollout import attention_rollout, gradient_rollout
from vitx.trace import Trace

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "Sanity",
    "Trace",
    "VitxError",
    "attention_flow",
    "attention_rollout",
    "capture",
    "explain",
    "explain_methods",
    "gradient_rollout",
    "methods",
    "sanity",
]

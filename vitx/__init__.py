"""vitx: see what a Vision Transformer looks at, while it learns.

    import vitx

    explanation = vitx.explain(model, images, "grad_rollout")
    pictures = explanation.overlays(images, mean, std)

During training: `vitx.Watch` in a loop of your own, `from vitx.callbacks import RolloutCallback` for
Lightning, and `from vitx.callbacks.huggingface import RolloutCallback` for Hugging Face's Trainer.
"""

from typing import TYPE_CHECKING, Any

from vitx.attribution import methods
from vitx.errors import VitxError
from vitx.evaluation.randomization import Sanity, sanity
from vitx.explaining import explain, explain_methods, trace
from vitx.explanation import Explanation
from vitx.functional.flow import attention_flow
from vitx.functional.rollout import attention_rollout, gradient_rollout
from vitx.overview import overview
from vitx.tape.trace import Trace, capture
from vitx.version import __version__ as __version__

if TYPE_CHECKING:
    from vitx.watch import Watch


__all__ = [
    "Explanation",
    "Sanity",
    "Trace",
    "VitxError",
    "Watch",
    "attention_flow",
    "attention_rollout",
    "capture",
    "explain",
    "explain_methods",
    "gradient_rollout",
    "methods",
    "overview",
    "sanity",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Imports the watch when it is asked for: an explanation does without."""
    if name != "Watch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitx.watch import Watch

    return Watch

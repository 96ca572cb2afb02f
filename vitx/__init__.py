"""See what a Vision Transformer looks at, while it learns.

    explanation = vitx.explain(model, "cat.jpg", "evidence")
    explanation.save("map.png")

Explain images:
    explain, explain_methods    maps of a batch of images, by one method or by several in one pass
    methods, targets            the names of the methods; what to explain instead of a class
    Explanation, load, overview the result, to draw or save; read it from a file; draw all maps at once
Watch a training run:
    Watch, callbacks            for your own training loop; for Lightning and Hugging Face's Trainer
Check a map:
    metrics, sanity, trace      score it, compare it with a randomized model's, list the steps behind it
Read attention:
    capture, attention_rollout, gradient_rollout, attention_flow   from a forward pass; from plain tensors

Invalid input raises a VitxError. The command `vitx` does the same from a shell.
"""

import typing

from vitx import metrics as metrics
from vitx import targets as targets
from vitx.attribution import methods as methods
from vitx.errors import VitxError as VitxError
from vitx.evaluation.randomization import Sanity as Sanity
from vitx.evaluation.randomization import sanity as sanity
from vitx.explaining import explain as explain
from vitx.explaining import explain_methods as explain_methods
from vitx.explaining import trace as trace
from vitx.explanation import Explanation as Explanation
from vitx.explanation import load as load
from vitx.functional.flow import attention_flow as attention_flow
from vitx.functional.rollout import attention_rollout as attention_rollout
from vitx.functional.rollout import gradient_rollout as gradient_rollout
from vitx.tracing import Trace as Trace
from vitx.tracing import capture as capture
from vitx.version import __version__ as __version__

overview = Explanation.overview

if typing.TYPE_CHECKING:
    from vitx.watch import Watch as Watch


def __getattr__(name: str) -> typing.Any:
    """Import `Watch` on first use, as explanations do not need it."""
    if name != "Watch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitx.watch import Watch

    return Watch

"""The watch of a training: it shows what a Vision Transformer looks at, and names no framework.

`Watch` serves a loop of one's own. The callbacks in `vitx.callbacks` are adapters: each answers, as a `Host`,
what an `Observer` asks of a training.
"""

from vitx.watch.host import Host
from vitx.watch.observer import Observer
from vitx.watch.settings import Settings
from vitx.watch.watch import Watch

__all__ = ["Host", "Observer", "Settings", "Watch"]

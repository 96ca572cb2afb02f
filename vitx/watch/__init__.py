"""The watch of a training: adapters of frameworks answer, as a `Host`, what an `Observer` asks of it."""

from vitx.watch.host import Host
from vitx.watch.observer import Observer
from vitx.watch.settings import Settings
from vitx.watch.watch import Watch

__all__ = ["Host", "Observer", "Settings", "Watch"]

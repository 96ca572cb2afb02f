"""Watching a training: an `Observer` explains and logs, and a `Host` adapts it to a framework or a loop."""

from vitx.watch.host import Host
from vitx.watch.observer import Observer
from vitx.watch.settings import Settings
from vitx.watch.watch import Watch

__all__ = ["Host", "Observer", "Settings", "Watch"]

"""Ask once whether the hub of Hugging Face answers: its client would try for a minute."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def hub() -> Iterator[bool]:
    """Run the block with the hub, or with the cache of this machine; yield whether the hub answers."""
    from huggingface_hub import constants, get_session

    answered = threading.Event()
    patience = constants.HF_HUB_ETAG_TIMEOUT  # as long as the client waits: a slow hub is a hub

    def ask() -> None:
        with suppress(Exception):  # each version of the client has its own
            get_session().head(constants.ENDPOINT, timeout=patience)
            answered.set()

    # In a thread: to look up the name alone may take half a minute, and cannot be stopped.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    answers, was = answered.is_set(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was or not answers
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = was

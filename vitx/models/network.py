"""A single check whether the Hugging Face hub answers, as its client would retry for a minute."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def hub() -> Iterator[bool]:
    """Run the block with the hub if it answers, else with the local cache; yield whether it answers."""
    from huggingface_hub import constants, get_session

    answered = threading.Event()
    patience = constants.HF_HUB_ETAG_TIMEOUT  # as long as the client waits, so that a slow hub counts

    def ask() -> None:
        with suppress(Exception):  # each version of the client raises its own errors
            get_session().head(constants.ENDPOINT, timeout=patience)
            answered.set()

    # In a thread, as the DNS lookup alone may take half a minute and cannot be interrupted.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    answers, was = answered.is_set(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was or not answers
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = was

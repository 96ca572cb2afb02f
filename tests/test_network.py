import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants
from timm.models._hub import has_hf_hub

from vitx import VitxError
from vitx.models import network
from vitx.models.checkpoints import create_model


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Return a function that makes a local port the hub, with an empty cache."""

    def become(port):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    return become


def test_a_hub_that_answers_is_used(asked):
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers HEAD with an error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked(server.server_port)
    with network.hub() as answers:
        assert answers
        assert not constants.HF_HUB_OFFLINE
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("patience", "used"), [(0.2, False), (5, True)])
def test_a_slow_hub_is_waited_for_as_long_as_its_client_would(asked, monkeypatch, patience, used):
    class Slow(BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(0.5)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", patience)
    asked(server.server_port)
    with network.hub() as answers:
        assert answers is used
    server.shutdown()
    server.server_close()


def test_a_silent_hub_is_given_up(asked, listener, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    asked(listener.getsockname()[1])  # accepts the connection, but never answers
    with network.hub() as answers:
        assert not answers
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.skipif(not has_hf_hub(), reason="timm cannot use the huggingface_hub that is installed")
def test_a_hub_that_refuses_is_said_at_once(asked, listener):
    asked(listener.getsockname()[1])
    listener.close()
    begun = time.monotonic()
    with pytest.raises(VitxError, match="could not be fetched from the hub: check the connection"):
        create_model("deit_tiny_patch16_224", True, None, {"depth": 1})
    assert time.monotonic() - begun < 5  # the hub's client by itself takes a minute

"""Runs a function in several processes that train together, as torchrun starts them."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import start_processes

PATIENCE = 240  # seconds until processes that wait for each other are given up


def run_together(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls function(*arguments) in `count` processes; raises if one fails or they hang."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = start_processes(_one, (count, port, function, arguments), count, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, f"the processes hang: they did not end within {PATIENCE} s"
    finally:
        for process in context.processes:
            process.kill()


def _one(rank: int, count: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

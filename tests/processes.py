"""Run a function in several processes that train together, as torchrun starts them, or in one of its own.

The processes are forked from one that has imported the libraries and done nothing else.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import start_processes

PATIENCE = 240  # seconds until processes that wait for each other are killed
LIBRARIES = ["lightning.pytorch", "timm", "transformers", "tensorboard", "vitx.callbacks"]

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(LIBRARIES)


def run_together(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call function(*arguments) in `count` processes; raise an error if one fails or they hang."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    given = count, port, function, arguments
    context = start_processes(_one, given, count, join=False, start_method="forkserver")
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):  # re-raises the error of a process
            assert time.monotonic() < deadline, f"the processes hang: they did not end within {PATIENCE} s"
    finally:
        for process in context.processes:
            process.kill()


def start_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Start a function in a process and a process group of its own, which exits with what it returns."""
    process = FORKED.Process(target=_apart, args=(function, arguments))
    process.start()
    return process


def _apart(function: Callable[..., Any], arguments: Any) -> None:
    os.setsid()
    # If the tests run in the background, SIGINT is ignored, and child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


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
    faulthandler.dump_traceback_later(PATIENCE // 2)  # shows where each process waits
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # rank 0 hosts the store through which the others find each other
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # torch 2.6 may hang when a process group is destroyed: its threads need the GIL

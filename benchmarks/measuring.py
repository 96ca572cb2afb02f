"""Times relative to a baseline, with calls in turn, and the memory of one call in a fresh process."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[], object]
SLOW = 10.0  # seconds; calls that take longer are measured in fewer rounds
SLOW_ROUNDS = 3


@dataclass
class Timing:
    """The times of one contender, also relative to the baseline in the same round.

    Attributes:
        seconds: the times of the rounds that count.
        ratios: these times over the baseline's.
        error: the reason if there are none.
    """

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the ratios."""
        if len(self.ratios) < 2:
            return self.ratio, self.ratio
        low, _, high = quantiles(self.ratios, n=4, method="inclusive")
        return low, high


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}"


def seconds(call: Call, device: str) -> float:
    """Return the seconds that a call takes."""
    gc.collect()  # so that no call collects the garbage of the previous one
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved(calls: Mapping[str, Call], baseline: str, rounds: int, device: str) -> dict[str, Timing]:
    """Time calls in turn, so that a machine that slows down does so for all of them.

    Args:
        calls: by name, including the baseline. A call that raises is left out of later rounds.
        baseline: the name of the call that the others are compared with.
        rounds: the number of rounds that count; one more comes first, to warm up.
        device: "cpu" or "cuda".

    Returns:
        The timing of each call, by name.
    """
    timings = {name: Timing() for name in calls}
    slow: set[str] = set()
    for turn in range(rounds + 1):
        names = [name for name in calls if name not in slow or turn <= SLOW_ROUNDS]
        taken: dict[str, float] = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if timings[name].error:
                continue
            try:
                taken[name] = seconds(calls[name], device)
            except Exception as error:
                if name == baseline:
                    raise
                timings[name].error = first_line(error)
        if turn == 0:
            slow = {name for name, value in taken.items() if value > SLOW and name != baseline}
            continue
        for name, value in taken.items():
            timings[name].seconds.append(value)
            timings[name].ratios.append(value / taken[baseline])
    return timings


def resident_peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, getrusage also counts the memory of the parent when it started this process.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(call: Call, device: str) -> int:
    """Return by how much the peak memory of a call exceeds the memory held before it, in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError):  # Linux only: reset the peak to the memory that is held now
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    call()
    return resident_peak() - before


def fresh_process(
    *arguments: str, python: Sequence[str] = (sys.executable,), path: Path | None = None
) -> dict[str, Any]:
    """Run Python with these arguments, and return the JSON on its last line, or {"error": ...}.

    Args:
        *arguments: the arguments of the command.
        python: the command that runs Python, by default this interpreter.
        path: the folder that is searched first for packages.
    """
    first = {} if path is None else {"PYTHONPATH": str(path.resolve())}
    done = subprocess.run([*python, *arguments], capture_output=True, text=True, env=os.environ | first)
    if done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode}, probably out of memory"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]  # not indented
        return {"error": (said or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def import_seconds(modules: list[str], rounds: int) -> dict[str, float]:
    """Return the median seconds that importing each module takes in fresh processes, in turn."""
    taken: dict[str, list[float]] = {module: [] for module in modules}
    for turn in range(rounds + 1):
        for module in modules:
            code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            if turn:  # the first import reads the files from disk
                taken[module].append(float(done.stdout))
    return {module: median(values) for module, values in taken.items()}

"""Time over a baseline, call by call in turn, and what one call needs in a fresh process."""

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
    """How long one contender took, over the baseline in the same round.

    Attributes:
        seconds: of each round that counts.
        ratios: those over the baseline's.
        error: why there are none.
    """

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ratio(self) -> float:
        """The median over the rounds."""
        return median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.ratios) < 2:
            return self.ratio, self.ratio
        low, _, high = quantiles(self.ratios, n=4, method="inclusive")
        return low, high


def first_line(error: BaseException) -> str:
    """Return what a table can say of an error."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}"


def seconds(call: Call, device: str) -> float:
    """Return how long a call takes."""
    gc.collect()  # no call pays for what the one before it left
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
    """Time calls in turn, so that a machine that grows slower does so for all of them.

    Args:
        calls: by name, the baseline among them. One that raises takes no part in later rounds.
        baseline: what the others are compared with.
        rounds: that count; one more comes before them, to warm up.
        device: "cpu" or "cuda".

    Returns:
        What was found, by name.
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
    """Return the most memory that this process ever held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux lets getrusage count what the parent held when it started this process, too.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(call: Call, device: str) -> int:
    """Return by how much a call's peak of memory exceeds what was held before it, in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError):  # Linux alone; then the peak so far is what is held now
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    call()
    return resident_peak() - before


def fresh_process(
    *arguments: str, python: Sequence[str] = (sys.executable,), path: Path | None = None
) -> dict[str, Any]:
    """Run a Python with the arguments and return the JSON on its last line, or {"error": ...}.

    Args:
        *arguments: of the command.
        python: the command that runs it, by default this one.
        path: where packages are looked for first.
    """
    first = {} if path is None else {"PYTHONPATH": str(path.resolve())}
    done = subprocess.run([*python, *arguments], capture_output=True, text=True, env=os.environ | first)
    if done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode}, probably out of memory"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]  # no details
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
            if turn:  # the first time reads the files from disk
                taken[module].append(float(done.stdout))
    return {module: median(values) for module, values in taken.items()}

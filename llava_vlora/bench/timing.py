"""Taking time and memory of calls that are to be compared."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

#: Sets a call up outside the measured time and hands out what is to be measured.
Prepared = Callable[[], AbstractContextManager[Callable[[], object]]]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")
_RESET_PEAK = "5"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    calls: Mapping[str, Prepared],
    rounds: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    All calls take part in every round, so that a slow spell of the machine meets all of them; each round starts
    with another one. One more round, unmeasured, comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with calls[name]() as call:
                synchronise(device)
                start = time.perf_counter()
                call()
                synchronise(device)
                taken = time.perf_counter() - start
            if turn:
                seconds[name].append(taken)
            progress()
    return seconds


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``call`` needs at most beyond what is in memory before it, or None where nobody counts them.

    On a GPU these are the tensors of PyTorch's allocator; on a CPU the resident pages of the process (Linux).
    """
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _CLEAR.exists():
        return None
    # Memory that was freed but kept by the C library would hide what the call needs.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text(_RESET_PEAK)
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a device still has for tensors, or None where nobody says (CPUs outside Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMORY.exists():
        return None
    line = next(row for row in _MEMORY.read_text().splitlines() if row.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _resident(name: str) -> int:
    line = next(row for row in _STATUS.read_text().splitlines() if row.startswith(name))
    return int(line.split()[1]) * 1024

"""A check of many items in several processes, in the order of the items, ended at once by an interrupt."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

from ..errors import VLoRAError

Item = TypeVar("Item")
Result = TypeVar("Result")
#: Makes, in the process that is to use it, a function that checks one item.
Opener = Callable[..., AbstractContextManager[Callable[[Item], Result]]]


class WorkerError(VLoRAError, RuntimeError):
    """A process of the pool died."""


def run(
    opener: Opener[Item, Result],
    arguments: tuple[Any, ...],
    items: Sequence[Item],
    *,
    workers: int,
    chunk: int,
    advance: Callable[[int], object],
) -> list[Result]:
    """Check all items.

    Args:
        opener: Function of a module; each process calls it once with ``arguments``.
        arguments: Small values that can be pickled.
        items: What to check.
        workers: Processes; with one, or a single chunk of items, all happens in this process.
        chunk: Items that a process takes at a time.
        advance: Told how many more items are done.

    Returns:
        One result for each item, in order.

    Raises:
        WorkerError: A process died, as it does when memory runs out.
    """
    chunks = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    if workers == 1 or len(chunks) <= 1:
        results = []
        with opener(*arguments) as check:
            for item in items:
                results.append(check(item))
                advance(1)
        return results
    return _run_pool(opener, arguments, chunks, min(workers, len(chunks)), advance)


def _run_pool(
    opener: Opener[Item, Result],
    arguments: tuple[Any, ...],
    chunks: Sequence[Sequence[Item]],
    workers: int,
    advance: Callable[[int], object],
) -> list[Result]:
    before = set(multiprocessing.active_children())
    # Not forked: this process has threads, and may hold gigabytes of records.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin, (opener, arguments)
    )
    try:
        futures: dict[Future[list[Result]], int] = {}
        with interrupts_held():  # a process whose start is cut short prints a traceback
            for i, items in enumerate(chunks):
                futures[pool.submit(_check_chunk, items)] = i
        done: list[list[Result]] = [[] for _ in chunks]
        for future in as_completed(futures):
            results = done[futures[future]] = future.result()
            advance(len(results))
    except BrokenProcessPool as error:
        raise WorkerError(
            f"A worker process died, perhaps for lack of memory: try fewer, --workers {max(1, workers // 2)}."
        ) from error
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [result for results in done for result in results]


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C for the end of a block that it must not cut short; processes started inside never get it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    held: list[int] = []
    # The mask is for the children; here, other threads would still take the signal and pass it on.
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


# --- in a worker ------------------------------------------------------------------------------------

_stack = ExitStack()
_check: list[Callable[[Any], Any]] = []


def _begin(opener: Opener[Any, Any], arguments: tuple[Any, ...]) -> None:
    _check.append(_stack.enter_context(opener(*arguments)))


def _check_chunk(items: Sequence[Any]) -> list[Any]:
    return [_check[0](item) for item in items]

"""Threads that read and write beside the computation, without taking the cores from it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def background_thread(name: str) -> ThreadPoolExecutor:
    """An executor of one thread, whose torch operations start no threads of their own.

    Otherwise OpenMP would keep a second team of threads for it. With more threads than cores, even
    idle ones, libgomp no longer spins but sleeps at the end of every parallel loop, and short
    operations of the main thread take twice as long ever after.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(1, name)
    executor.submit(_compute_alone).result()
    torch.set_num_threads(threads)  # for threads to come; the count of a running one is its own
    return executor


def _compute_alone() -> None:
    torch.get_num_threads()  # which takes the common count, if nothing has before
    torch.set_num_threads(1)

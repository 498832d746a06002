"""Threads beside the computation."""

from __future__ import annotations

import torch

from gptq.background import background_thread


def test_a_background_thread_computes_alone():
    """And leaves the number of threads of all others as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with background_thread("first") as first, background_thread("second") as second:
            for thread in (first, second):
                thread.submit(lambda: torch.randn(1_000_000).sum()).result()
                assert thread.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

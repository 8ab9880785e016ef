"""Threads that compute wait for nobody longer than they must, and nothing breaks where that is not allowed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import priorities
from ensembles import ThreadGroup

linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities and timer slack of their own there")


def in_a_thread(work: Callable[[], int]) -> int:
    """What comes of it on a thread that ends then."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@linux
def test_threads_get_the_interpreter_promptly_and_so_do_those_started_later() -> None:
    slack = "ctypes.CDLL(None).prctl(30, 0, 0, 0, 0)"  # PR_GET_TIMERSLACK, of the calling thread
    code = f"""
import ctypes, priorities, sys, threading
priorities.switch_promptly()
found = [sys.getswitchinterval(), {slack}]
thread = threading.Thread(target=lambda: found.append({slack}))
thread.start()
thread.join()
print(round(1e6 * found[0]), *found[1:])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["20", "1", "1"]


@linux
def test_the_thread_that_asks_goes_first_where_it_may_and_no_other_does() -> None:
    def asked() -> int:
        priorities.go_first()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert in_a_thread(asked) == (priorities.FIRST if may_go_first() else before)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@linux
def test_members_of_an_ensemble_compute_beside_one_that_goes_first_and_do_not_go_first_themselves() -> None:
    def asked() -> tuple[int, int]:
        priorities.go_first()
        group, both = ThreadGroup(1, 1), threading.Barrier(2)

        def measured() -> Tensor:
            both.wait(20)  # one each
            return torch.tensor(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

        found = sorted(int(each) for each in group([measured, measured]) if isinstance(each, Tensor))
        group.close(1)
        return found[0], found[1]

    usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asked).result() == (priorities.FIRST if may_go_first() else usual, usual)


def may_go_first() -> bool:
    """Whether this process may raise priorities."""

    def tried() -> int:
        return ctypes.CDLL(None, use_errno=True).setpriority(0, threading.get_native_id(), priorities.FIRST)

    return in_a_thread(tried) == 0


def test_where_it_is_not_allowed_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("only root may")

    monkeypatch.setattr(os, "setpriority", refused)
    priorities.go_first()

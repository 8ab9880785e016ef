"""How the threads of this process share its processors and the interpreter; measured in docs/LOG.md.

A batch on a CPU wants the interpreter before and after each of its parts, and one that is no program (programs.py)
around each of a hundred short calls. What the event loop keeps it for meanwhile, so many times, decides how long it
takes where requests are many. Knows nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading

# After so long, a thread that waits for the interpreter is to get it; Python has 5 ms unless told.
SWITCH_INTERVAL_S = 0.00002
# Linux wakes a thread whose time has come up to 50 us later unless told: longer than that interval.
TIMER_SLACK_NS = 1
# Of threads that compute, as nice values: from -20, which is first, to 19.
FIRST = -10
_PR_SET_TIMERSLACK = 29  # linux/prctl.h


def switch_promptly() -> None:
    """Threads that wait for the interpreter get it at once: this one, and those that it starts from now on."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)


def go_first() -> None:
    """Let the calling thread run before others that want the same processor, where the system allows that."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it takes CAP_SYS_NICE, or a limit such as systemd's LimitNICE
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), FIRST)


def go_with_others() -> None:
    """Have the calling thread run as the main thread does, whatever the one does that started it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            usual = os.getpriority(os.PRIO_PROCESS, os.getpid())  # of the main thread, whose number that is
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), usual)

"""SIGTERM, SIGINT and SIGUSR1: the step in progress ends, and all ranks save that step and leave.

Told before there is anything to save, or told twice, a process ends at once, whatever it waits for: a thread
hears the signals, for Python's own handlers run only when a collective returns, which after the death of
another rank it may never do. The rest is rundir.leave_if_told, which the loops ask at every step and in every
micro-batch of an evaluation; the other ranks hear of it with the step's means. Exit code 0 after SIGUSR1 and
under Slurm, which tells so before it takes a machine back; else 128 + the signal's number.
"""

import os
import signal
import threading

HEARD = {"number": 0, "waits": False}  # the signal that came; whether a loop will ask for it


def listen() -> None:
    """From here on a signal ends the process in one line and, after `wait`, when a loop asks."""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(ear,), daemon=True).start()


def wait() -> None:
    """There is something to save from here on."""
    HEARD["waits"] = True


def heard() -> int:
    """The number of the signal that came, or 0."""
    return HEARD["number"]


def exit_code(number: int) -> int:
    """Of a process that a signal has ended in good order."""
    return 0 if number == signal.SIGUSR1 or "SLURM_JOB_ID" in os.environ else 128 + number


def _listen(ear: int) -> None:
    while number := os.read(ear, 1):
        if number[0] in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            _hear(number[0])


def _hear(number: int) -> None:
    if HEARD["waits"] and not HEARD["number"]:
        HEARD["number"] = number
        return
    when = "again, nothing saved" if HEARD["number"] else "before the first step, nothing to save"
    os.write(2, f"stopped by {signal.Signals(number).name} ({when})\n".encode())
    os._exit(128 + number if HEARD["number"] else exit_code(number))

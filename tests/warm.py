"""Real scripts without their six seconds of imports, for tests that start many processes by others' commands.

    serve(SOCKET)                                    has imported the scripts, and forks for each request
    python tests/warm.py SOCKET align.py FLAGS...    what stands where `python align.py FLAGS...` would: runs it in a
                                                     fork of the server, with this process's environment, folder
                                                     and files; signals are passed on, a kill too
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def serve(place: str) -> None:
    import align
    import sft
    import signals

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who serves one request
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(16)
    listener.settimeout(5)
    parent = os.getppid()
    while os.getppid() == parent:  # a server ends with its tests, however they end
        try:
            link, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                one(link, {"align.py": align, "sft.py": sft}, signals)
            finally:
                os._exit(1)
        link.close()


def one(link: socket.socket, scripts: dict, signals) -> None:
    """Fork once more, and tell how that ends; end it where its client ends."""
    told, descriptors, _, _ = socket.recv_fds(link, 2**20, 3)
    asked = json.loads(told)
    if (pid := os.fork()) == 0:
        link.close()
        for own, given in enumerate(descriptors):
            os.dup2(given, own)
        sys.stdout, sys.stderr = (open(own, "w", buffering=1, closefd=False) for own in (1, 2))  # not a test's
        os.environ.clear()
        os.environ |= asked["env"]
        os.chdir(asked["folder"])
        code = 1
        try:
            signals.listen()
            scripts[Path(asked["argv"][0]).name].main(asked["argv"][1:])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(code)
    for given in descriptors:
        os.close(given)
    with contextlib.suppress(OSError):  # the client may have been killed
        link.sendall(b"%d\n" % pid)
    if link in select.select([link, os.pidfd_open(pid)], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        link.sendall(b"%d\n" % code)


def ask(place: str, argv: list[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    link = socket.socket(socket.AF_UNIX)
    link.connect(place)
    asked = json.dumps({"argv": argv, "env": dict(os.environ), "folder": os.getcwd()})
    socket.send_fds(link, [asked.encode()], [0, 1, 2])
    answers = link.makefile()
    pid = int(answers.readline())
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return int(answers.readline())


if __name__ == "__main__":
    code = ask(sys.argv[1], sys.argv[2:])
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)

"""``python -m tests.support.fork_server LISTENER IMPORTS``: forks a process per piece of code that it is sent.

Each begins with the imports that were made here, which take most of the start of a process that uses vLLM. It ends when
nobody is connected any more.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from typing import Any


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """Returns the order in a process that was forked for it, and None here at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    selector.register(client, selectors.EVENT_READ, client.makefile("rb"))
                    continue
                line = key.data.readline()
                if not line:
                    selector.unregister(key.fileobj)
                    key.data.close()
                    key.fileobj.close()  # type: ignore[union-attr]
                    if len(selector.get_map()) == 1:
                        os.unlink(listener.getsockname())
                        return None
                elif os.fork() == 0:
                    return _fork(json.loads(line), key.fileobj)  # type: ignore[arg-type]


def _fork(order: dict[str, Any], client: socket.socket) -> dict[str, Any]:
    """Forks the process itself, waits for it here and says how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # whoever asked is gone
            client.sendall(f"{status}\n".encode())
        os._exit(0)
    for number, name in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["root"])
    sys.path.insert(0, order["root"])  # a copy of the checkout may share this process with it
    return order


def _end(status: int) -> None:
    """As a process ends, without taking thousands of modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(code: str) -> int:
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    exec(sys.argv[2])
    gc.freeze()  # pages of what was imported stay shared
    _order = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _order is not None:
        sys.argv[:] = ["-c", *_order["arguments"]]
        _end(_run(_order["code"]))
    os._exit(0)

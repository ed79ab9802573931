"""Run torchrun or `accelerate launch` in this process, and end with the status that its ranks mean.

    python -m llmtrain.cli.launcher [--rejoin] torch.distributed.run --standalone ... -m llmtrain.cli.main ...

torchrun ends with 1 whatever its ranks end with. Those of llmtrain also write their status into a file: 75,
start me again; 78, never again. A 78 ends torchrun at once, however many restarts it has left.

With --rejoin the launch begins anew when ranks have left because another machine was told to: those that are
left meet again. torchrun would first wait 300 s for the machine that has gone; here it is 10 s.

A machine that vanishes leaves connections behind on which nothing ever comes. torchrun asks the meeting
point all the time and without a limit, so it would hang until the kernel gives up the connection, by default
after a quarter of an hour. Here each of its connections ends when what was sent is not acknowledged for
AGENT_SILENCE_S seconds.
"""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

from llmtrain.errors import EXIT_FAILED
from llmtrain.log import setup_logging
from llmtrain.train.deadline import EXIT_AGAIN, EXIT_FILE, EXIT_NEVER

log = logging.getLogger("llmtrain.launcher")

LOOK_EVERY_S = 1.0
LAST_S = 10.0
"""How long after its own ranks a launcher waits for other machines' when the run leaves: ranks leave
together, and until then they need the store in the launcher of rank 0's machine."""
DEFAULT_SILENCE_S = 600
"""As train.process_group_timeout_s: torchrun sits out what its ranks sit out."""


def main() -> None:
    arguments = sys.argv[1:]
    rejoins = arguments[:1] == ["--rejoin"]
    module, *words = arguments[rejoins:]
    silence = os.environ.get("AGENT_SILENCE_S", str(DEFAULT_SILENCE_S))
    if not silence.isdigit() or int(silence) < 1:
        print(f"error: AGENT_SILENCE_S={silence} must be a number of seconds, 1 or more", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    setup_logging()
    folder = tempfile.mkdtemp(prefix="llmtrain-")
    told = Path(folder, "status")
    os.environ[EXIT_FILE] = str(told)
    look = partial(_look, told, silence_s=int(silence), rejoins=rejoins)
    threading.Thread(target=look, name="launcher", daemon=True).start()
    sys.argv = [module, *words]
    failure: BaseException | None = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except (Exception, SystemExit) as error:
        failure = error
    meant, why = _read(told)
    shutil.rmtree(folder)
    is_told = hasattr(failure, "sigval")  # torchrun's SignalException
    if meant == EXIT_AGAIN and rejoins and not is_told:
        _meet_again(why)
    if meant is not None:
        log.warning("the ranks ended with status %d", meant)
        sys.exit(meant)
    if failure is not None:
        raise failure


def _meet_again(why: str) -> None:
    """Begin this process anew, unless a time limit was why ranks left: that one holds for all machines."""
    if "time limit" not in why:
        log.warning("ranks left because the machines change; meeting those that are there")
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _read(told: Path) -> tuple[int | None, str]:
    """The status that a rank wrote, and what it wrote after it; None where no rank wrote one."""
    try:
        number, _, why = told.read_text(encoding="utf-8").strip().partition(" ")
    except FileNotFoundError:
        return None, ""
    return (int(number) if number.isdigit() else None), why


def _look(told: Path, *, silence_s: int, rejoins: bool) -> None:
    """From a thread: bound the silence of new connections; end torchrun when there is nothing to wait for."""
    pause, in_barrier_s = threading.Event(), 0.0
    while not pause.wait(LOOK_EVERY_S):
        _bound_silence(silence_s)
        meant, why = _read(told)
        if meant == EXIT_NEVER:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        in_barrier_s = in_barrier_s + LOOK_EVERY_S if meant == EXIT_AGAIN and _is_in_exit_barrier() else 0.0
        if in_barrier_s >= LAST_S:  # in C++, where no signal reaches the main thread
            shutil.rmtree(told.parent)
            if rejoins:
                _meet_again(why)
            os._exit(EXIT_AGAIN)


def _is_in_exit_barrier() -> bool:
    """Whether torchrun's own ranks have ended well, and it waits for those of other machines."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "_exit_barrier":  # of torch.distributed.elastic.agent.server.api, 2.13
            return True
        frame = frame.f_back
    return False


def _bound_silence(silence_s: int) -> None:
    """Have the kernel end every TCP connection of this process on which nothing is acknowledged for so long
    (tcp(7), TCP_USER_TIMEOUT)."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed by now
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as each:
                if each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM:
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_s * 1000)


if __name__ == "__main__":
    main()

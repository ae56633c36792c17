"""What a fork of the forkserver becomes: a script, a module, a function, or another program.

The fork returns up to the forkserver's ``main`` (nothing of the server is left on its stack) and ends up in
``become``, which makes it a process of its own (session, signals, output, environment, threads), runs the program as
``python`` would have, and ends without taking torch apart. An exception that nobody caught is printed without the
frames of the launcher and written to torchelastic's error file, unless the script did so itself.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from outlast.agent import isolation
from outlast.agent.forkprotocol import Spawn

STACKS_SIGNAL = signal.SIGUSR2
"""Makes a Python child write the stacks of its threads to its stderr."""

_OWN_DEFAULTS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_NOT_FOUND = 127


def become(spawn: Spawn, parent: int) -> NoReturn:
    """Be that process, from its setup to its end. ``parent`` is the forkserver, with which it dies."""
    with _Ending():
        _separate(spawn, parent)
        _set_world(spawn)
        if spawn.kind == "exec":
            _execute(spawn)
        _set_interpreter(spawn)
        if spawn.kind == "script":
            _run_script(spawn)
        elif spawn.kind == "module":
            _run_module(spawn)
        else:
            module, _, name = spawn.target.partition(":")
            getattr(importlib.import_module(module), name)(*spawn.args)
    raise AssertionError("a child's ending returned")


def separate(parent: int | None) -> None:
    """Make this fork a session of its own with fresh signal handling; it dies with ``parent``, if one is given."""
    os.setsid()
    if parent is not None:
        isolation.die_with_parent(parent, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in _OWN_DEFAULTS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _separate(spawn: Spawn, parent: int) -> None:
    separate(parent)
    redirect(spawn.stdout, spawn.stderr)
    Path("/proc/self/comm").write_text((spawn.role or spawn.id)[:15])
    if spawn.isolate is not None:
        isolation.enter(spawn.isolate)


def redirect(stdout: str, stderr: str) -> None:
    """Let the standard streams be nothing, and these two files (appended to, by lines)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for path, mode, target in ((os.devnull, os.O_RDONLY, 0), (stdout, flags, 1), (stderr, flags, 2)):
        opened = os.open(path, mode, 0o644)
        os.dup2(opened, target)
        os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _set_world(spawn: Spawn) -> None:
    """The environment and the folder."""
    env = dict(spawn.env)
    if spawn.threads is not None:
        env.setdefault("OMP_NUM_THREADS", str(spawn.threads))
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    os.chdir(spawn.cwd)


def _execute(spawn: Spawn) -> NoReturn:
    try:
        os.execvpe(spawn.argv[0], list(spawn.argv), dict(os.environ))
    except OSError as error:
        print(f"cannot run {spawn.argv[0]}: {error.strerror}", file=sys.stderr)
        os._exit(_NOT_FOUND)


def _set_interpreter(spawn: Spawn) -> None:
    """What a fresh interpreter would not share with its siblings, and what it reads from its environment."""
    gc.enable()
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True, chain=False)
    for place in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if place and place not in sys.path:
            sys.path.insert(0, place)
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if spawn.threads is not None and torch is not None:
        torch.set_num_threads(spawn.threads)


def _run_script(spawn: Spawn) -> None:
    sys.argv = list(spawn.argv)
    sys.path.insert(0, str(Path(spawn.argv[0]).resolve().parent))
    runpy.run_path(spawn.argv[0], run_name="__main__")


def _run_module(spawn: Spawn) -> None:
    sys.argv = list(spawn.argv)
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module(spawn.argv[0], run_name="__main__", alter_sys=True)


class _Ending:
    """Ends this process with its program, however that ended: reported, threads and exit handlers run, output flushed.

    The interpreter is not taken down: torch's threads and static objects can crash there, long after all is done.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        code = _exit_code(error)
        if error is not None and not isinstance(error, SystemExit):
            frames = _without_launcher(tb)
            _write_error_file(error.with_traceback(frames))
            sys.excepthook(type(error), error, frames)
        with _Abrupt(code or 1):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _Abrupt:
    """Ends the process with ``code`` when what is inside raises."""

    def __init__(self, code: int) -> None:
        self._code = code

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and not isinstance(error, SystemExit):
            traceback.print_exception(error, file=sys.__stderr__)
            os._exit(self._code)


def _exit_code(error: BaseException | None) -> int:
    """As ``python`` ends: 0, 1 for an exception, 130 for an interrupt, or what ``sys.exit`` was given."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _without_launcher(tb: TracebackType | None) -> TracebackType | None:
    """The traceback from the program's own first frame on (all of it when that has none)."""
    own = tb
    while own is not None and own.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>", runpy.__file__):
        own = own.tb_next
    return own or tb


def _write_error_file(error: BaseException) -> None:
    """As torch.distributed.elastic's ErrorHandler does for programs under ``@record``."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or Path(path).exists():
        return
    text = "".join(traceback.format_exception(error))
    extra = {"py_callstack": text[-16000:], "timestamp": f"{time.time():.6f}"}
    message = {"message": f"{type(error).__qualname__}: {str(error)[:4000]}", "extraInfo": extra}
    try:
        Path(path).write_text(json.dumps({"message": message}))
    except OSError as failure:
        print(f"cannot write {path}: {failure.strerror}", file=sys.stderr)

"""How an entry point starts and ends: errors in one line, exit code 2; signals; what ends no run.

Whatever a user can fix is a `config.UserError`. A pipe that nobody reads any more, a letter that the terminal
lacks, and a user id without a name end nothing. One of several ranks that cannot go on leaves without
waiting for the others, which `launch.py` ends then.
"""

import argparse
import contextlib
import errno
import getpass
import io
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import NoReturn, TextIO

from config import UserError

LONGEST_ERROR = 1000  # characters that are printed of one; what is quoted in it may be a whole file
NO_ROOM_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
GONE = (errno.ENOENT, errno.ESTALE)  # what somebody removed while it was in use
PATIENCE_SEC = 3  # of a rank that fails: if another's end is the reason, this one is ended before it speaks

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")  # in torch's errors of a GPU and of a CPU


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a UserError, and no room, right, file or memory, are one line and exit code 2."""
    name_user()
    with redirect_stdout(Printer(sys.stdout)), redirect_stderr(Printer(sys.stderr)):
        try:
            main()
        except UserError as e:
            refuse(str(e))
        except OSError as e:
            if e.errno not in (*NO_ROOM_OR_RIGHT, *GONE):
                raise
            refuse(f"{e.filename or 'a file'}: cannot be read or written ({e.strerror})")
        except Exception as e:
            if isinstance(e, MemoryError) or OUT_OF_MEMORY.search(str(e)):
                refuse(f"not enough memory: make or read less at once ({e})")
            if not is_one_of_several():
                raise
            refuse(f"{type(e).__name__}: {e}", traceback.format_exc())
        finally:
            sys.stdout.flush()


def is_one_of_several() -> bool:
    """Whether this process is a rank, with others beside it."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def name_user() -> None:
    """Give a user id without a passwd entry, as containers have, the name and home that libraries ask for."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13
        os.environ["USER"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = tempfile.gettempdir()


class Printer:
    """stdout or stderr, which end no run: what nobody reads any more goes nowhere, a letter that they lack is
    printed as its number.
    """

    def __init__(self, stream: TextIO | None):
        """stream: None where it was closed before the start."""
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            # as do the processes that pack, where they are not forks
            os.environ["PYTHONIOENCODING"] = f"{stream.encoding}:backslashreplace"

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.or_nowhere():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.or_nowhere():
            self.stream.flush()

    @contextlib.contextmanager
    def or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a pipe without a reader, a terminal that was closed, a full disk
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line as all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def refuse(message: str, details: str = "") -> NoReturn:
    """End with a line and exit code 2; details: of an error that nobody foresaw, printed before it.

    Of several ranks with the same error the first speaks; the network's threads could hold a rank back.
    """
    if not is_one_of_several():
        print(f"error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)
    rank = int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which launch.py and torchrun end the others
    time.sleep(PATIENCE_SEC if details else min(rank, 1))
    print(f"{details}error: rank {rank}: {one_line(message)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def one_line(message: str) -> str:
    """Line ends and control characters as they are typed in Python; of a long text beginning and end."""
    visible = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if len(visible) <= LONGEST_ERROR:
        return visible
    half = LONGEST_ERROR // 2
    return f"{visible[:half]} ... {visible[-half:]}"


# Signals


class Interrupted(BaseException):
    """A signal came while what was done could be left."""


class Stop:
    """Whether a signal has asked this process to end, and whether it may do so by raising Interrupted."""

    asked = False
    raises = False

    def catch_signals(self, react: Callable = lambda: None) -> None:
        """From now on SIGTERM, SIGINT and SIGHUP ask; a second SIGINT ends at once.

        A terminal that is closed may send SIGHUP twice; under nohup it stays ignored.
        react: what else each of them does.
        """
        self.asked = False
        self.react = react
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        if signal.getsignal(hangup) != signal.SIG_IGN:
            signal.signal(hangup, self.handle)

    def handle(self, number: int, _frame) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self.react()
        if self.raises:
            self.raises = False
            raise Interrupted

    def run(self, work: Callable):
        """What `work` returns; None, at once, where a signal comes or has come."""
        try:
            self.raises = True
            done = None if self.asked else work()
            self.raises = False
            return done
        except Interrupted:
            return None
        finally:
            self.raises = False


stop = Stop()  # of this process, as its signals are

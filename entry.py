"""How an entry point starts and ends: errors in one line, exit code 2; what ends no run.

Whatever a user can fix is a `config.UserError`. A pipe that nobody reads any more, a letter that the terminal
lacks, and a user id without a name end nothing.
"""

import argparse
import contextlib
import errno
import getpass
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import NoReturn, TextIO

from config import UserError

LONGEST_ERROR = 1000  # characters that are printed of one; what is quoted in it may be a whole file
NO_ROOM_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")  # in torch's errors of a GPU and of a CPU


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a UserError, no room, memory or right become one line on stderr and exit code 2."""
    name_user()
    with redirect_stdout(Printer(sys.stdout)), redirect_stderr(Printer(sys.stderr)):
        try:
            main()
        except UserError as e:
            refuse(str(e))
        except OSError as e:
            if e.errno not in NO_ROOM_OR_RIGHT:
                raise
            refuse(f"{e.filename or 'a file'}: cannot be read or written ({e.strerror})")
        except (MemoryError, RuntimeError) as e:
            if not OUT_OF_MEMORY.search(str(e)) and not isinstance(e, MemoryError):
                raise
            refuse(f"not enough memory: make or read less at once ({e})")
        finally:
            sys.stdout.flush()


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


def refuse(message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def one_line(message: str) -> str:
    """Line ends and control characters as they are typed in Python; of a long text beginning and end."""
    visible = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if len(visible) <= LONGEST_ERROR:
        return visible
    half = LONGEST_ERROR // 2
    return f"{visible[:half]} ... {visible[-half:]}"

"""How an entry point starts and ends: errors in one line, exit code 2; what ends no run.

Whatever a user can fix is a `config.UserError`. A pipe that nobody reads any more, a letter that the terminal
lacks, and a user id without a name end nothing.
"""

import contextlib
import errno
import getpass
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import NoReturn, TextIO

from config import UserError

NO_ROOM_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
GONE = (errno.ENOENT, errno.ESTALE)  # what somebody removed while it was in use


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a UserError, and no room, no right or no file, become one line and exit code 2."""
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


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

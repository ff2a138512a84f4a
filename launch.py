"""Start the ranks of a training, and end them together: `python launch.py --ranks 8 train.py ...`.

It sets what `torch.distributed` reads from the environment, as torchrun does, passes SIGTERM, SIGINT and
SIGHUP on, and exits as its ranks do: 0 where all ended well, whatever asked them to. One rank that fails ends
all, at once and on every machine. The machines of --nodes hold a line to the first one, on --master's port,
and count as lost when nothing was heard of them for SILENCE_SEC. After the greeting a byte says all: BEAT, or
how the ranks of a machine ended, an exit code; GOOD from the first is said of all machines.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from config import UserError
from entry import Parser, run_main, stop

BEAT = b"\xff"
GOOD = b"\0"
BEAT_SEC = 1
SILENCE_SEC = 40  # a link may fail for so long
JOIN_SEC = 900  # that the machines wait for each other at the start: one may still be installing
POLL_SEC = 0.1
LONGEST_GREETING = 100  # bytes


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ranks", type=int, default=1, help="processes on this machine, as many as GPUs")
    add("--nodes", type=int, default=1, help="machines")
    add("--node_rank", type=int, default=0, help="which of them this is")
    add("--master", default="127.0.0.1:0", help="HOST:PORT, the first machine")
    add("command", nargs=argparse.REMAINDER, help="a script and its arguments")
    options = parser.parse_args()
    host, _, port = options.master.rpartition(":")
    machines, rank_port = join(options, host, int(port))
    ranks = start_ranks(options, host, rank_port)
    try:
        wait(ranks, machines, options.node_rank == 0)
    except BaseException as e:
        code = e.code if isinstance(e, SystemExit) else 2
        tell(machines, bytes([code]))
        raise
    finally:
        for process in ranks.values():
            process.kill()
    tell(machines, GOOD)


# The machines


def join(options: argparse.Namespace, host: str, port: int) -> tuple[dict[int, socket.socket], int]:
    """Find the other machines.

    returns: lines to them by their numbers, of the first to all, of the others to the first; and the port of
    torch's own store, which the first has chosen.
    """
    greeting = f"nanoaudio {options.nodes} {options.ranks}"
    if options.node_rank > 0:
        return connect(host, port, f"{greeting} {options.node_rank}")
    with socket.create_server(("", 0)) as unused:
        rank_port = unused.getsockname()[1]
    machines = {}
    if options.nodes > 1:
        machines = welcome(options.nodes, port, greeting)
    tell(machines, f"{rank_port}\n".encode())
    return machines, rank_port


def welcome(nodes: int, port: int, greeting: str) -> dict[int, socket.socket]:
    """Of the first machine: wait for the others; raises UserError for one that was started differently."""
    machines = {}
    deadline = time.monotonic() + JOIN_SEC
    try:
        server = socket.create_server(("", port))
    except OSError as e:
        raise UserError(f"--master: port {port} cannot be listened on ({e.strerror}); choose another") from e
    with server:
        while len(machines) < nodes - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                line, address = server.accept()
            except TimeoutError as e:
                found = len(machines) + 1
                raise UserError(f"after {JOIN_SEC} s {found} of {nodes} machines are there") from e
            line.settimeout(10)
            words, _, node = read_line(line).rpartition(" ")
            if words == greeting and node.isdigit() and int(node) not in machines:
                machines[int(node)] = line
            elif words.startswith("nanoaudio"):
                fault = f"{address[0]} was started with other --nodes or --gpus, or the same --node_rank"
                raise UserError(f"{fault}: it says '{words} {node}', this one '{greeting}'")
            else:
                line.close()  # a stranger
    return machines


def connect(host: str, port: int, greeting: str) -> tuple[dict[int, socket.socket], int]:
    """Of the others: find the first machine, as soon as it listens."""
    deadline = time.monotonic() + JOIN_SEC
    while True:
        try:
            line = socket.create_connection((host, port), timeout=10)
            break
        except OSError as e:
            if time.monotonic() > deadline:
                raise UserError(f"--master {host}:{port}: nobody there for {JOIN_SEC} s ({e})") from e
            time.sleep(1)
    line.sendall(f"{greeting}\n".encode())
    line.settimeout(JOIN_SEC)
    answer = read_line(line)
    if not answer.isdigit():
        raise UserError(f"--master {host}:{port} has refused this machine, or ended: its output says why")
    return {0: line}, int(answer)


def read_line(line: socket.socket) -> str:
    """What was sent up to a newline, which is not kept; "" where that does not come."""
    said = b""
    with contextlib.suppress(OSError):
        while len(said) < LONGEST_GREETING:
            byte = line.recv(1)
            if byte == b"\n":
                return said.decode(errors="replace")
            if not byte:
                break
            said += byte
    return ""


def tell(machines: dict[int, socket.socket], word: bytes) -> None:
    for line in machines.values():
        with contextlib.suppress(OSError):  # one that is gone is noticed by `listen`
            line.sendall(word)


def listen(node: int, line: socket.socket, heard: dict[int, float]) -> bool:
    """Whether a machine says that its ranks ended well; heard: when it last said anything, seconds.

    raises UserError where they did not, or where it is lost.
    """
    line.settimeout(0)
    try:
        said = line.recv(1000)
    except BlockingIOError:
        silence = time.monotonic() - heard[node]
        if silence < SILENCE_SEC:
            return False
        raise UserError(
            f"machine {node}: nothing heard for {silence:.0f} s; it is down, or cut off"
        ) from None
    except OSError as e:
        raise UserError(f"machine {node} is lost ({e.strerror})") from e
    if not said:
        raise UserError(f"machine {node} is gone")
    heard[node] = time.monotonic()
    code = max(said.replace(BEAT, b""), default=None)
    if code == 1:
        sys.exit(1)  # a figure that was missed: its machine has said so
    if code:
        raise UserError(f"machine {node} ended with exit code {code}; its own output says why")
    return code == 0


# The ranks


def start_ranks(options: argparse.Namespace, host: str, port: int) -> dict[int, subprocess.Popen]:
    """The processes of this machine, by their ranks among those of all machines; they get its signals."""
    shared = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(options.nodes * options.ranks),
        "LOCAL_WORLD_SIZE": str(options.ranks),
    }
    if options.ranks > 1:
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    ranks = {}
    for local_rank in range(options.ranks):
        rank = options.node_rank * options.ranks + local_rank
        own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        ranks[rank] = subprocess.Popen(
            [sys.executable, *options.command], env={**os.environ, **shared, **own}
        )
    stop.catch_signals(lambda: [process.terminate() for process in ranks.values()])
    return ranks


def wait(ranks: dict[int, subprocess.Popen], machines: dict[int, socket.socket], is_first: bool) -> None:
    """Return when the ranks of all machines have ended well.

    raises SystemExit with the exit code of a rank that did not, and has said why; UserError where nobody has.
    """
    heard = dict.fromkeys(machines, time.monotonic())
    good = set()
    next_beat = 0.0
    while True:
        running = [rank for rank, process in ranks.items() if is_running(rank, process)]
        for node, line in machines.items():
            if listen(node, line, heard):
                good.add(node)
        if not running and len(good) == len(machines):
            return
        if time.monotonic() > next_beat:
            tell(machines, BEAT if running or is_first else GOOD)
            next_beat = time.monotonic() + BEAT_SEC
        time.sleep(POLL_SEC)


def is_running(rank: int, process: subprocess.Popen) -> bool:
    """False where it ended well."""
    code = process.poll()
    if not code:
        return code is None
    if code > 0:
        sys.exit(code)
    if stop.asked:  # before it could do that well
        sys.exit(128 - code)
    killer = signal.Signals(-code).name
    hint = ", as the kernel does where memory runs out" if killer == "SIGKILL" else ""
    raise UserError(f"rank {rank} was ended by {killer}{hint}")


if __name__ == "__main__":
    run_main(main)

"""End all processes of a run when one dies: each holds a connection to the first, which the system closes with it."""

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .files import RunError
from .interruption import Interrupted

if TYPE_CHECKING:
    from accelerate import Accelerator

_SECONDS_TO_END = 8.0
"""How long a process may take to end by itself, as where all have met the same error, before it is ended."""

_SECONDS_TO_HEAR = 2.0
"""How long after a communication error to wait for the news that a process has died."""

_DONE = struct.pack("!i", -1)


@contextlib.contextmanager
def watched(accelerator: "Accelerator", abandoned: Callable[[str], None]) -> Iterator[None]:
    """End all processes within ten seconds, with exit status 1, if one dies or leaves the block with an error.

    A thread of each listens, so it does not matter what the process is waiting for. Before it ends, the first process,
    or the second if the first died, calls `abandoned` with a line that says which process died. A machine that vanishes
    is noticed after 17 seconds. A collective of all processes.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = _Watch(accelerator, abandoned)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, RunError) and watch.heard.wait(_SECONDS_TO_HEAR):
            time.sleep(2 * _SECONDS_TO_END)  # another process died: this one's thread reports that and ends it
        watch.leave()
        raise
    except BaseException as error:
        watch.leave(done=isinstance(error, Interrupted))  # which all processes have agreed on
        raise
    watch.leave(done=True)


class _Watch:
    def __init__(self, accelerator: "Accelerator", abandoned: Callable[[str], None]):
        self.rank, self.world, self.abandoned = accelerator.process_index, accelerator.num_processes, abandoned
        self.heard, self.left, self.lock = threading.Event(), threading.Event(), threading.Lock()
        try:
            self.peers = _connect(self.rank, self.world)
        except OSError as error:
            raise RunError(f"the processes cannot reach the first one ({error})") from error
        for peer in self.peers:
            threading.Thread(target=self._attend, args=(peer,), daemon=True).start()

    def leave(self, *, done: bool = False) -> None:
        """Close the connections; ``done``: first tell the others that this process ended as planned."""
        self.left.set()
        for connection in self.peers.values():
            with contextlib.suppress(OSError):
                if done:
                    connection.sendall(_DONE)
                connection.shutdown(socket.SHUT_RDWR)

    def _attend(self, peer: int) -> None:
        try:
            message = self.peers[peer].recv(4, socket.MSG_WAITALL)
        except OSError:
            message = b""
        if self.left.is_set() or message == _DONE:
            return
        lost = struct.unpack("!i", message)[0] if len(message) == 4 else peer
        with self.lock:
            if self.heard.is_set():
                return
            self.heard.set()
        if self.rank == 0:
            for connection in self.peers.values():
                with contextlib.suppress(OSError):
                    connection.sendall(struct.pack("!i", lost))
        if self.left.wait(_SECONDS_TO_END):
            return
        if self.rank == (1 if lost == 0 else 0):
            self.abandoned(
                f"process {lost} of {self.world} (counted from 0) died, so all stop; the last checkpoint is kept: "
                "go on with mea train --resume"
            )
        os._exit(1)


def _connect(rank: int, world: int) -> dict[int, socket.socket]:
    """Return the first process's connections to all others, or another's to the first, by rank.

    A shared secret keeps out strangers.
    """
    from accelerate.utils import broadcast_object_list

    given: list[tuple[int, bytes] | None] = [None]
    found = {}
    if rank:
        broadcast_object_list(given)
        assert given[0] is not None
        port, secret = given[0]
        # Without an address from a launcher the processes have met through a file, so on one machine.
        found[0] = socket.create_connection((os.environ.get("MASTER_ADDR", "localhost"), port), timeout=60)
        found[0].sendall(secret + struct.pack("!i", rank))
    else:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world) as server:
            secret = secrets.token_bytes(16)
            broadcast_object_list([(server.getsockname()[1], secret)])
            server.settimeout(60)
            while len(found) < world - 1:
                connection, _ = server.accept()
                connection.settimeout(10)
                greeting = b""
                with contextlib.suppress(OSError):  # a stranger hung up, or says nothing
                    while len(greeting) < 20 and (more := connection.recv(20 - len(greeting))):
                        greeting += more
                if len(greeting) == 20 and secrets.compare_digest(greeting[:16], secret):
                    found[struct.unpack("!i", greeting[16:])[0]] = connection
                else:
                    connection.close()
    for connection in found.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return found

"""Runs `mea` in a process of its own, without the seconds that importing everything takes each time.

The processes are forked from one that has imported it all and done nothing else; arguments, files, signals, exit status
and death are those of the real command.
"""

import dataclasses
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "tests.cli.train_command",
        "accelerate",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "memory_efficient_attention_pytorch.cli.train",
        "memory_efficient_attention_pytorch.training.runs",
        "torch.distributed.checkpoint",
    ]
)


@dataclasses.dataclass(frozen=True)
class Result:
    status: int
    out: str
    error: str


class Mea:
    """One call of `mea`, begun at once.

    file_limit: bytes beyond which its files cannot grow; what it meets then is what a full disk is.
    terminal: the terminal's name, for its output instead of a file.
    kill_at: the stage of writing, counted from 1, before which it kills itself.
    environment: variables that it has besides.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        stdin: bytes = b"",
        file_limit: int | None = None,
        kill_at: int | None = None,
        terminal: str | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.streams = Path(tempfile.mkdtemp(dir=folder.parent, prefix="streams"))
        (self.streams / "stdin").write_bytes(stdin)
        (self.streams / "stderr").touch()  # now, since it may be killed before it opens them
        if terminal is None:
            (self.streams / "stdout").touch()
        else:
            (self.streams / "stdout").symlink_to(terminal)
        self.process = _CONTEXT.Process(
            target=_command, args=(str(folder), arguments, str(self.streams), file_limit, kill_at, environment or {})
        )
        self.process.start()

    def finish(self, *, read_output: bool = True) -> Result:
        self.process.join(timeout=120)
        assert self.process.exitcode is not None, "it does not end"
        out = (self.streams / "stdout").read_text() if read_output else ""
        return Result(self.process.exitcode, out, (self.streams / "stderr").read_text())

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


def mea(folder: Path, *arguments: str, **options) -> Result:
    """Run `mea` in a folder to its end."""
    return Mea(folder, *arguments, **options).finish()


def together(world: int, act: Callable[..., None], *arguments: object) -> None:
    """Call ``act(rank, world, *arguments)`` in so many processes at once; AssertionError if one of them fails."""
    running = [_CONTEXT.Process(target=act, args=(rank, world, *arguments)) for rank in range(world)]
    for process in running:
        process.start()
    try:
        for process in running:
            process.join(timeout=200)
        assert [process.exitcode for process in running] == [0] * world, "see what they wrote to standard error"
    finally:
        for process in running:
            process.kill()


def launch(folder: Path, world: int, *arguments: str, rank: int | None = None, **options) -> list[Mea]:
    """The processes of a call as torchrun starts them; the options are of the one of that rank."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Mea(
            folder,
            *arguments,
            environment=common | {"RANK": str(each), "LOCAL_RANK": str(each)},
            **(options if each == rank else {}),
        )
        for each in range(world)
    ]


def _command(
    folder: str,
    arguments: tuple[str, ...],
    streams: str,
    file_limit: int | None,
    kill_at: int | None,
    environment: Mapping[str, str],
):
    os.environ.update(environment)
    import torch

    from memory_efficient_attention_pytorch.cli import main

    os.chdir(folder)
    torch.set_num_threads(1)  # the others would wait for each other on a busy machine
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(f"{streams}/{name}", flags), number)
        setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if kill_at is not None:
        _die_while_writing(kill_at)
    sys.exit(main(arguments))


def _die_while_writing(kill_at: int) -> None:
    from memory_efficient_attention_pytorch.training import checkpoints, files, parts

    calls = 0

    def dying(work):
        def act(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **options)

        return act

    for name in ("save_model", "save_file", "sha256", "discard"):
        setattr(checkpoints, name, dying(getattr(checkpoints, name)))
    for name in ("flush", "discard"):
        setattr(files, name, dying(getattr(files, name)))
    for name in ("save_file", "flush", "sha256"):
        setattr(parts, name, dying(getattr(parts, name)))

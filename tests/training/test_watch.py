"""The first process connects to the others whoever else knocks."""

import socket
import struct
import threading

import pytest

pytest.importorskip("accelerate")

from memory_efficient_attention_pytorch.training.watch import _connect


def test_strangers_are_sent_away(monkeypatch):
    """One hangs up at once, one says something else, one too little; none keeps the second process out."""
    told, known = threading.Event(), []

    def broadcast(objects):
        if objects[0] is not None:
            known.append(objects[0])
            told.set()
        assert told.wait(30)
        objects[0] = known[0]

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", broadcast)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    found = {}
    first = threading.Thread(target=lambda: found.update(_connect(0, 2)))
    first.start()
    assert told.wait(30)
    for says in (None, b"x" * 20, b"x"):
        with socket.create_connection(("localhost", known[0][0]), timeout=30) as stranger:
            if says is None:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                stranger.sendall(says)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
    with monkeypatch.context() as slowly:
        whole = socket.socket.sendall
        slowly.setattr(socket.socket, "sendall", lambda own, data: [whole(own, data[i : i + 7]) for i in (0, 7, 14)])
        second = _connect(1, 2)
    first.join(30)
    assert list(found) == [1]
    assert list(second) == [0]
    found[1].sendall(b"here")
    assert second[0].recv(4) == b"here"
    for connection in (*found.values(), *second.values()):
        connection.close()

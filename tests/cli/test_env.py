"""`mea env`: what a report of a fault needs, and nothing of the person who reports it."""

import os
import platform
import re
import socket
from importlib.metadata import PackageNotFoundError

import torch

import memory_efficient_attention_pytorch as package
from memory_efficient_attention_pytorch import select_backend
from memory_efficient_attention_pytorch.cli import main


def test_versions_machine_and_the_way_attention_is_computed(capsys):
    assert main(["env"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"memory-efficient-attention-pytorch {package.__version__}"
    said = dict(line.split("  ", 1) for line in lines)
    said = {name: value.strip() for name, value in said.items()}
    assert said["python"] == platform.python_version()
    assert said["torch"] == torch.__version__
    assert said["devices"].startswith("cpu")
    assert said["threads"] == str(torch.get_num_threads())
    q, k, v = (torch.zeros(1, 8, 2048, 64, requires_grad=True) for _ in range(3))
    choice = select_backend(q, k, v, causal=True)
    assert said["attention, cpu, fp32"] == f"{choice.name} ({choice.way}): {choice.reason}"


def test_a_package_that_is_missing_is_said_to_be(capsys, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert main(["env"]) == 0
    assert re.search(r"^peft +not installed$", capsys.readouterr().out, re.MULTILINE)


def test_no_name_of_a_host_or_a_folder_is_in_it(capsys):
    main(["env"])
    said = capsys.readouterr().out
    assert socket.gethostname() not in said.split()
    assert os.getcwd() not in said

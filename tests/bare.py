"""What works with PyTorch, NumPy and safetensors alone, run by tests/wheel.py in an environment that has no more."""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import tempfile
from pathlib import Path

import torch

import memory_efficient_attention_pytorch as package
from memory_efficient_attention_pytorch.cli import main

# What an extra would bring. filelock is PyTorch's own requirement.
EXTRAS = ("accelerate", "rich", "matplotlib", "tensorboard", "tokenizers", "tomli_w", "transformers", "peft", "pytest")


def mea(*arguments: str) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(arguments)
    return status, out.getvalue(), errors.getvalue()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


assert not [name for name in EXTRAS if importlib.util.find_spec(name)], "the environment is not bare"
assert Path(sys.prefix) in Path(package.__file__).parents, package.__file__
assert (Path(package.__file__).parent / "py.typed").is_file()
for name in package.__all__:
    getattr(package, name)
assert package.__version__ == importlib.metadata.version("memory-efficient-attention-pytorch")
assert mea("--version") == (0, f"mea {package.__version__}\n", "")
status, out, errors = mea("env")
assert (status, errors) == (0, ""), errors
assert "not installed" in out

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 700, 16, requires_grad=True) for _ in range(3))
theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
expected = torch.autograd.grad(theirs.sum(), (q, k, v))
for backend in ("auto", "naive", "tiled"):
    ours = package.dot_product_attention(q, k, v, causal=True, backend=backend)
    same(ours, theirs)
    for gradient, right in zip(torch.autograd.grad(ours.sum(), (q, k, v)), expected, strict=True):
        same(gradient, right)

hidden, weight, labels = torch.randn(50, 8), torch.randn(30, 8), torch.randint(30, (50,))
same(
    package.linear_cross_entropy(hidden, weight, labels),
    torch.nn.functional.cross_entropy(hidden @ weight.T, labels),
)

size = {"num_tokens": 64, "max_seq_len": 128, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
tokens, losses = torch.randint(64, (2, 65)), []
for reversible in (True, False):
    torch.manual_seed(0)
    model = package.Transformer(**size, causal=True, exact=True, reversible=reversible)
    loss = model(tokens[:, :-1], labels=tokens[:, 1:])
    loss.backward()
    losses.append([loss, *(parameter.grad for parameter in model.parameters())])
assert all(torch.equal(ours, right) for ours, right in zip(*losses, strict=True))
assert package.AutoregressiveWrapper(model).generate(tokens[:1, :4], 3).shape == (1, 3)

assert package.plan(size | {"causal": True}, batch_size=1, seq_len=128, device="cpu").peak_bytes > 0
status, out, errors = mea("plan", "--seq-len", "512", "--depth", "2")
assert (status, errors) == (0, "")
assert "needs at its peak" in out

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    Path("text.txt").write_text("some text\n" * 2000)
    for command, extra in (
        (("train", "--data", "text.txt", "--steps", "1", "--out", "run"), "train"),
        (("plan", "--seq-len", "512", "--plot", "memory.png"), "train"),
        (("plan", "--model", ".", "--seq-len", "512"), "huggingface"),
        (("export", "run", "exported"), "huggingface"),
    ):
        status, out, errors = mea(*command)
        assert status == 2, (command, status, out, errors)
        assert f"pip install memory-efficient-attention-pytorch[{extra}]" in errors.replace("'", ""), errors

"""torch.compile of a Transformer: the same step, and no graphs for each length."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from memory_efficient_attention_pytorch import (
    AutoregressiveWrapper,
    ReversibleSequence,
    Transformer,
    dot_product_attention,
)
from memory_efficient_attention_pytorch.torch_internals.capabilities import ALL
from tests.compiled import Counted

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler, about what it does not follow

CONFIG = {"num_tokens": 67, "max_seq_len": 64, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "causal": True}
LENGTHS = (23, 31, 17, 40)
STORED = {"reversible": False}
QUICK = (
    {},
    {"positions": "alibi", "dropout": 0.1},
    {"positions": "rotary", "window": 8, "keep_attention": True},
    {"head_chunks": 2, "ff_chunks": 4},
    {"exact": True, "tie_embeddings": True},
    STORED,
)
SLOW = (
    STORED | {"positions": "alibi"},
    STORED | {"positions": "rotary", "window": 8},
    STORED | {"dropout": 0.1},
    STORED | {"head_chunks": 2, "ff_chunks": 4},
    STORED | {"exact": True},
    STORED | {"depth": 10, "positions": "rotary", "kv_heads": 1},
)


def step(model: Transformer, called, length: int, logits: bool = False) -> list[torch.Tensor]:
    """The loss and the gradients of a batch of this length."""
    torch.manual_seed(length)
    model.zero_grad()
    tokens = torch.arange(2 * length).view(2, length) % 61
    loss = called(tokens).logsumexp(-1).mean() if logits else called(tokens, labels=tokens)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def backend():
    torch._dynamo.reset()
    counters.clear()
    for part in ALL.values():
        part._looked_up = False  # as in a new process
    yield Counted()
    torch._dynamo.reset()


@pytest.mark.parametrize("changes", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=str)
def test_a_compiled_step_is_the_same_and_compiled_for_two_lengths_of_any(changes, backend):
    model, made = Transformer(**{**CONFIG, **changes}), []
    expected = [step(model, model, length) for length in LENGTHS]
    compiled = torch.compile(model, backend=backend)
    for length, truth in zip(LENGTHS, expected, strict=True):
        torch.testing.assert_close(step(model, compiled, length), truth, rtol=2e-5, atol=2e-5)
        made.append(backend.graphs)
    assert made[1] == made[2] == made[3]  # for the first length, and once more for all others
    assert made[0] > 0 if changes.get("reversible") is False else made[3] == 0
    assert CONFIG["num_tokens"] not in backend.widths  # no logits
    # A stream's largest value, for a warning, is read with stored activations, too.
    values = ["item()"] if changes.get("exact") else []
    assert all(any(word in reason for word in ("disable", *values)) for reason in counters["graph_break"])


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_a_length_known_to_change_is_compiled_once(dynamic, backend):
    """Marked by ``mark_dynamic``, which raises if a graph is for one length, or all sizes by ``dynamic=True``."""
    model = Transformer(**CONFIG, **STORED, positions="rotary")
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)

    def marked(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if dynamic is None:
            torch._dynamo.mark_dynamic(tokens, 1)
        return compiled(tokens, labels=labels)

    made = []
    for length in LENGTHS:
        step(model, marked, length)
        made.append(backend.graphs)
    assert made[0] == made[3]
    assert made[0] == 1 or dynamic  # which takes widths and rates for variables, too, and breaks where those are read


def test_logits_with_stored_activations_are_one_graph(backend):
    """Without a break: fullgraph would raise."""
    model = Transformer(**CONFIG, **STORED)
    expected = step(model, model, 23, logits=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(step(model, compiled, 23, logits=True), expected, rtol=2e-5, atol=2e-5)
    assert backend.graphs == 1
    assert CONFIG["num_tokens"] in backend.widths


SERVED = {
    "plain": {},
    "causal": {"causal": True},
    "padding": {"mask": torch.arange(23).expand(2, 23) > torch.tensor([[4], [0]])},
    "bias": {"attn_bias": torch.arange(23.0).sin().expand(2, 23, 23).contiguous()},
    "autocast": {},
}


@pytest.mark.parametrize("kind", SERVED)
def test_attention_that_pytorchs_function_computes_is_part_of_a_graph(kind, backend):
    """At any length: on this device tiles may be faster, but cannot be followed."""
    given = SERVED[kind]

    def attend(q: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return dot_product_attention(q, q, q, **given) + 1

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for length in (23, 2048) if not given else (23,):
        q = torch.randn(2, 2, length, 16)
        torch.testing.assert_close(compiled(q), attend(q))


def test_a_way_that_does_not_serve_is_refused_as_without_a_compiler(backend):
    q = torch.randn(1, 2, 23, 16)
    compiled = torch.compile(lambda q: dot_product_attention(q, q, q, window=4, backend="fused"), backend=backend)
    with pytest.raises(NotImplementedError, match="'fused' cannot serve this call: the window"):
        compiled(q)


def test_evaluation_is_compiled_and_generation_is_not(backend):
    """A cache is longer at each token."""
    model = Transformer(**CONFIG).eval()
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        logits, text = model(tokens), AutoregressiveWrapper(model).generate(tokens, 12, temperature=0.0)
        model.compile(backend=backend)
        torch.testing.assert_close(model(tokens), logits)
        assert backend.graphs == 1
        assert torch.equal(AutoregressiveWrapper(model).generate(tokens, 12, temperature=0.0), text)
    assert backend.graphs == 1


def test_what_backward_computes_again_is_never_compiled(backend):
    """A compiler's own random numbers and roundings would be others than those of the repetition."""

    class Noisy(nn.Module):
        compiled = False

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Noisy.compiled |= torch.compiler.is_compiling()
            return self.net(x)

    net, x = ReversibleSequence([(Noisy(), Noisy())]), torch.randn(2, 5, 8)
    torch.compile(net, backend=backend)(x).sum().backward()
    assert not Noisy.compiled
    for block in net:  # as they are for FSDP
        block.compile(backend=backend)
    net(x).sum().backward()
    assert not Noisy.compiled
    with torch.no_grad():
        torch.compile(net, backend=backend)(x)
    assert Noisy.compiled

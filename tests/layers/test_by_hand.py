"""Whatever is not exactly the module that we know runs itself; whatever parameters forward saw, backward uses."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

from memory_efficient_attention_pytorch import Attention, Chunked, FeedForward, PreNorm, ReversibleSequence, Transformer
from memory_efficient_attention_pytorch.recompute.by_hand import reason_against
from memory_efficient_attention_pytorch.recompute.pieces import pieces_of
from tests.agreement import assert_same, gradients
from tests.branches import stored

SHAPE = {"num_tokens": 29, "max_seq_len": 12, "dim": 16, "depth": 2, "heads": 4, "dim_head": 4, "causal": True}
PIECES = {"head_chunks": 2, "ff_chunks": 3}


def build(**kwargs):
    torch.manual_seed(0)
    return Transformer(**{**SHAPE, **kwargs}).double()


def step(model, x, parameters=None):
    """The loss, the logits and the gradients of the parameters given, or of the model's own."""
    names, wanted = zip(*(model.named_parameters() if parameters is None else parameters.items()), strict=True)
    call = {"labels": x}
    loss = model(x, **call) if parameters is None else functional_call(model, parameters, (x,), call)
    logits = model(x) if parameters is None else functional_call(model, parameters, (x,))
    cotangent = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    return dict(
        zip(
            ("loss", "logits", *names, *(f"{name} from the loss" for name in names)),
            (
                loss.detach(),
                logits.detach(),
                *torch.autograd.grad(logits, wanted, cotangent, allow_unused=True),
                *torch.autograd.grad(loss, wanted, allow_unused=True),
            ),
            strict=True,
        )
    )


def assert_same_step(ours, truth, tolerance=1e-9):
    assert ours.keys() == truth.keys()
    assert_same(list(ours.values()), list(truth.values()), tolerance)


TOKENS = torch.arange(24).view(2, 12) * 7 % 29
SETTINGS = [{}, PIECES, {**PIECES, "exact": True}, {"tie_embeddings": True}]


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
@pytest.mark.parametrize("leaves", [True, False])
def test_functional_call(kwargs, leaves):
    """Parameters that a module is lent for one call: all of their gradients, and none of the module's own."""
    torch.manual_seed(1)
    whole = {} if "exact" in kwargs else {"head_chunks": 1, "ff_chunks": 1}  # sums of pieces are rounded piece by piece
    model, stored = build(**kwargs), build(**{**kwargs, **whole, "reversible": False})
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    base = {name: (p + torch.randn_like(p) / 10).detach().requires_grad_() for name, p in model.named_parameters()}
    lent = base if leaves else {name: 2 * (p / 2) for name, p in base.items()}
    ours = step(model, TOKENS, lent)
    lent = base if leaves else {name: 2 * (p / 2) for name, p in base.items()}
    truth = step(stored, TOKENS, lent)
    assert_same_step(ours, truth)
    assert all(grad is not None for grad in ours.values())
    assert all(p.grad is None and torch.equal(p, own[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_backward_after_a_second_call_with_other_parameters(kwargs):
    model = build(**kwargs)
    first, second = (
        {name: (p * factor).detach().requires_grad_() for name, p in model.named_parameters()} for factor in (1, 1.5)
    )
    losses = [functional_call(model, lent, (TOKENS,), {"labels": TOKENS}) for lent in (first, second)]
    ours = [torch.autograd.grad(loss, list(lent.values())) for loss, lent in zip(losses, (first, second), strict=True)]
    for found, lent in zip(ours, (first, second), strict=True):
        loss = functional_call(model, lent, (TOKENS,), {"labels": TOKENS})
        assert_same(found, torch.autograd.grad(loss, list(lent.values())), 1e-9)


LAYERS = [
    *("layers.0.0", "layers.0.0.norm", "layers.0.0.fn", "layers.0.0.fn.to_q", "layers.0.0.fn.to_kv"),
    *("layers.0.0.fn.to_out", "layers.1.1", "layers.1.1.norm", "layers.1.1.fn", "layers.1.1.fn.net"),
    *("layers.1.1.fn.net.0", "layers.1.1.fn.net.1", "layers.1.1.fn.net.2", "to_logits", "to_logits.0", "to_logits.1"),
]


def replace_forward(module):
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs) * 1.25


def hook(module):
    module.register_forward_hook(lambda module, args, out: out * 1.25)


class Scaled(nn.Module):
    """Not of the class that was there, but with its attributes, as adapters have them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 1.25


@pytest.mark.filterwarnings("ignore:head_chunks")
@pytest.mark.parametrize("change", [replace_forward, hook])
@pytest.mark.parametrize("where", LAYERS)
def test_replaced_forwards_and_hooks_count_wherever_they_are(where, change):
    plain = build(**PIECES)
    found = []
    for model in (build(**PIECES), build(reversible=False)):
        change(model.get_submodule(where))
        found.append(step(model, TOKENS))
    assert_same_step(*found)
    assert not torch.isclose(found[0]["loss"], step(plain, TOKENS)["loss"])


@pytest.mark.filterwarnings("ignore:head_chunks")
@pytest.mark.parametrize("where", ["layers.0.0.fn.to_q", "layers.1.1.fn.net.0", "layers.0.0.norm", "to_logits.1"])
def test_other_classes_in_place_of_layers(where):
    found = []
    for model in (build(**PIECES), build(reversible=False)):
        parent, _, name = where.rpartition(".")
        setattr(model.get_submodule(parent), name, Scaled(model.get_submodule(where)))
        found.append(step(model, TOKENS))
    assert_same_step(*found)


@pytest.mark.filterwarnings("ignore:head_chunks")
def test_hooks_on_all_modules_see_every_layer():
    model, seen = build(**PIECES), []
    truth = step(model, TOKENS)
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        found = step(model, TOKENS)
    finally:
        handle.remove()
    assert_same_step(found, truth)
    assert {module for module in model.modules() if type(module) is nn.Linear} <= set(seen)


@pytest.mark.filterwarnings("ignore:head_chunks")
def test_parametrized_weights():
    found = []
    for model in (build(**PIECES), build(reversible=False)):
        for name in ("layers.0.0.fn.to_q", "layers.0.1.fn.net.0", "to_logits.1"):
            parametrizations.weight_norm(model.get_submodule(name))
        found.append(step(model, TOKENS))
    assert_same_step(*found)


class Reversed(nn.Module):
    """A reversible block of f and tanh."""

    def __init__(self, f, whole):
        super().__init__()
        self.f, self.whole = f, whole

    def forward(self, x):
        blocks = [(self.f, nn.Tanh())]
        return stored(blocks, x) if self.whole else ReversibleSequence(blocks)(x)


COMPUTED = {
    "attention": (lambda pieces: Attention(dim=16, heads=4, dim_head=4, head_chunks=pieces), "to_q"),
    "feed-forward": (lambda pieces: FeedForward(16, chunks=pieces), "net.2"),
    "chunked": (lambda pieces: Chunked(nn.Linear(16, 16), chunks=pieces), "module"),
    "branches": (lambda pieces: Reversed(nn.Linear(16, 16), whole=pieces == 1), "f"),
}


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize(("make", "name"), COMPUTED.values(), ids=COMPUTED)
def test_a_weight_that_is_no_parameter_has_its_gradient(make, name, leaf):
    """A tensor put in a parameter's place, computed by a hypernetwork or in an inner step of learning to learn."""
    found = []
    for pieces in (1, 2):
        torch.manual_seed(0)
        net, x = make(pieces), torch.randn(2, 7, 16, requires_grad=True)
        layer = net.get_submodule(name)
        weight = layer.weight.detach().clone().requires_grad_()
        del layer.weight
        layer.weight = weight if leaf else weight.tanh()
        out = net(x)
        found.append([out, *gradients(out, [x, weight])])
    assert_same(*found, 1e-5)


def test_an_attribute_that_is_gone_before_backward_had_its_value():
    net, x = Chunked(nn.Linear(16, 16), chunks=2), torch.randn(2, 7, 16)
    net.module.probe = torch.zeros(3, requires_grad=True)  # used by nobody
    out = net(x)
    del net.module.probe
    out.sum().backward()
    assert not hasattr(net.module, "probe")
    torch.testing.assert_close(net.module.weight.grad, x.sum((0, 1)).expand(16, 16))


def test_a_result_that_a_module_keeps_is_no_weight():
    """Its graph is gone by the next step."""

    class Keeps(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x).square()
            return self.kept

    net = ReversibleSequence([(Keeps(8, 8), Keeps(8, 8))])
    for _ in range(2):
        net(torch.randn(2, 5, 8)).sum().backward()
        assert net.blocks[0][0].kept.requires_grad


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.GELU, FeedForward, Attention])
def test_a_class_whose_forward_was_replaced_runs_it(kind, monkeypatch):
    forward, model = kind.forward, build(**PIECES)
    before = model(TOKENS)
    monkeypatch.setattr(kind, "forward", lambda self, x, *rest, **kwargs: forward(self, x, *rest, **kwargs) * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, truth = (build(**settings)(TOKENS) for settings in (PIECES, {"reversible": False}))
    assert_same([ours], [truth], 1e-9)
    assert not torch.allclose(ours, before)


@pytest.mark.parametrize("around", [lambda net: net, lambda net: ReversibleSequence([(net, nn.Identity())])])
def test_a_warning_names_the_option_the_layer_and_the_reason_once(around):
    net = Attention(dim=8, heads=2, dim_head=4, head_chunks=2)
    hook(net.to_kv)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            around(net)(torch.randn(1, 5, 8)).sum().backward()
    assert [str(warning.message) for warning in said] == [
        "head_chunks: Attention is computed as a whole, not in pieces: of to_kv, it has hooks"
    ]


def test_a_norm_that_mixes_tokens_is_not_applied_to_some_of_them():
    class OverTokens(nn.Module):
        def forward(self, x):
            return F.layer_norm(x, x.shape[1:])

    for norm in (OverTokens(), nn.LayerNorm((7, 8))):
        ours, whole = (PreNorm(8, FeedForward(8, 2, chunks=chunks)).double() for chunks in (3, 1))
        ours.norm = whole.norm = norm.double()
        whole.load_state_dict(ours.state_dict())
        x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
        out, truth = ReversibleSequence([(nn.Identity(), ours)])(x), x + x + x + whole(x + x)
        wanted = [gradients(y, (x, *net.parameters())) for y, net in ((out, ours), (truth, whole))]
        assert_same((out, *wanted[0]), (truth, *wanted[1]), 1e-10)


def test_a_norm_before_a_norm_is_a_branch_as_any_other():
    ours, whole = (PreNorm(8, PreNorm(8, FeedForward(8, 2, chunks=chunks))).double() for chunks in (3, 1))
    whole.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    out, truth = ReversibleSequence([(nn.Identity(), ours)])(x), x + x + x + whole(x + x)
    wanted = [gradients(y, (x, *net.parameters())) for y, net in ((out, ours), (truth, whole))]
    assert_same((out, *wanted[0]), (truth, *wanted[1]), 1e-10)


def test_pieces_are_taken_of_the_class_that_says_what_forward_does():
    class Doubled(Attention):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    options = {"dim": 8, "heads": 2, "dim_head": 4, "head_chunks": 2}
    net, x = Doubled(**options), torch.randn(1, 5, 8)
    assert pieces_of(net) is None
    assert pieces_of(Attention(**options)) is not None
    with torch.no_grad():
        y = x + net(x)
        assert_same([ReversibleSequence([(net, nn.Identity())])(x)], [y + (x + y)], 1e-6)


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(2, 2), None),
        (lambda: Subclass(2, 2), "it is a Subclass, no Linear"),
        (lambda: parametrizations.orthogonal(nn.Linear(2, 2)), "it is a ParametrizedLinear, no Linear"),
    ],
)
def test_reasons(make, reason):
    assert reason_against(make(), nn.Linear) == reason


def test_a_weight_of_another_type():
    class Other(torch.Tensor):
        pass

    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Other))
    assert "another type" in reason_against(module, nn.Linear)


@pytest.mark.parametrize("around", [lambda net: net, lambda net: ReversibleSequence([(net, nn.Identity())])])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("kind", ["attention", "feed-forward"])
def test_another_dtype_than_the_weights_is_refused_as_by_a_linear_layer(kind, pieces, around):
    attention = Attention(dim=8, heads=2, dim_head=4, head_chunks=pieces)
    net = around(attention if kind == "attention" else FeedForward(8, chunks=pieces))
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises((ValueError, RuntimeError), match="dtype"):
            net(torch.randn(1, 6, 8, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(1, 6, 8, dtype=torch.bfloat16)).sum().backward()


def test_a_forward_of_another_module_is_a_replaced_one():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    one.forward = one.forward
    assert reason_against(one, nn.Linear) is None
    one.forward = other.forward
    assert reason_against(one, nn.Linear) == "its forward has been replaced"
    assert reason_against(copy.deepcopy(one), nn.Linear) == "its forward has been replaced"


def test_a_class_that_is_called_otherwise(monkeypatch):
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: 2 * nn.Module.__call__(self, x), raising=False)
    assert reason_against(nn.Linear(2, 2), nn.Linear) == "its class's forward has been replaced"

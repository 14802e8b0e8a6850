"""accelerate's hooks and peft's adapters on our networks: the logits and gradients of the plain network."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Transformer
from tests.agreement import assert_same

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:head_chunks")

SHAPE = {"num_tokens": 29, "max_seq_len": 12, "dim": 16, "depth": 2, "heads": 4, "dim_head": 4, "causal": True}
SETTINGS = [
    {},
    {"head_chunks": 2, "ff_chunks": 3},
    {"exact": True, "positions": "rotary"},
    {"positions": "alibi", "tie_embeddings": True},
    {"reversible": False, "tie_embeddings": True},
]
TOKENS = torch.arange(24).view(2, 12) * 7 % 29
CPU = torch.device("cpu")


def build(**kwargs):
    torch.manual_seed(0)
    return Transformer(**{**SHAPE, **kwargs}).double()


def step(model):
    """Loss, logits, and the gradients of the loss."""
    loss = model(TOKENS, labels=TOKENS)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), model(TOKENS).detach(), *torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
@pytest.mark.parametrize("offloaded", ["model", "blocks", "layers"])
def test_weights_that_are_there_only_while_their_module_runs(offloaded, kwargs):
    model, truth = build(**kwargs), build(**kwargs)
    parts = {
        "model": [model],
        "blocks": list(model.layers),
        "layers": [module for module in model.modules() if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding)],
    }
    for part in parts[offloaded]:
        accelerate.cpu_offload(part, CPU)
    assert any(p.is_meta for p in model.parameters())
    # A sum that is taken in another order may round to the next point of the grid.
    tolerance = 1e-4 if kwargs.get("exact") else 1e-9
    with torch.no_grad():
        assert_same([model(TOKENS)], [truth(TOKENS)], tolerance)
        assert_same([model(TOKENS, labels=TOKENS)], [truth(TOKENS, labels=TOKENS)], tolerance)
    assert_same([model(TOKENS).detach()], [truth(TOKENS).detach()], tolerance)


def align(model):
    accelerate.hooks.attach_align_device_hook(model, execution_device=CPU)


def dispatch(model):
    accelerate.dispatch_model(model, {name: "cpu" for name, _ in model.named_children()}, force_hooks=True)


def scale_outputs(model):
    class Scaling(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return 1.25 * output

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.GELU):
            accelerate.hooks.add_hook_to_module(module, Scaling())


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
@pytest.mark.parametrize("attach", [align, dispatch, scale_outputs])
def test_a_step_under_hooks(attach, kwargs):
    model, truth = build(**kwargs), build(**{**kwargs, "head_chunks": 1, "ff_chunks": 1, "reversible": False})
    for net in (model, truth) if attach is scale_outputs else (model,):
        attach(net)
    assert_same(step(model), step(truth), 1e-4 if kwargs.get("exact") else 1e-9)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_same([model(TOKENS)], [build(**kwargs)(TOKENS)], 0.0)


def adapted(kwargs, **options):
    peft = pytest.importorskip("peft")
    model = build(**kwargs)
    torch.manual_seed(1)
    targets = ["to_q", "to_kv", "to_out", "net.0", "net.2", *([] if kwargs.get("tie_embeddings") else ["to_logits.1"])]
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).double()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_low_rank_adapters(kwargs, options):
    """Every layer that we compute by hand has one; and merged into the weights they are computed by hand again."""
    ours = adapted(kwargs, **options)
    stored = adapted({**kwargs, "head_chunks": 1, "ff_chunks": 1, "reversible": False}, **options)
    tolerance = 1e-4 if kwargs.get("exact") else 1e-9
    found = step(ours)
    assert_same(found, step(stored), tolerance)
    assert len(found) >= 2 + 2 * 2 * 5
    with ours.disable_adapter():
        assert_same([ours(TOKENS)], [build(**kwargs)(TOKENS)], tolerance)
    merged = ours.merge_and_unload()
    assert_same([merged(TOKENS, labels=TOKENS), merged(TOKENS)], found[:2], tolerance)


@pytest.mark.parametrize("kwargs", SETTINGS[:3], ids=str)
def test_adapters_for_some_layers_leave_the_others_in_pieces(kwargs):
    peft = pytest.importorskip("peft")
    found = []
    for changes in (kwargs, {**kwargs, "head_chunks": 1, "ff_chunks": 1, "reversible": False}):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["to_q"], layers_to_transform=[0], layers_pattern="layers")
        config.init_lora_weights = False
        found.append(step(peft.get_peft_model(build(**changes), config).double()))
    assert_same(*found, 1e-4 if kwargs.get("exact") else 1e-9)

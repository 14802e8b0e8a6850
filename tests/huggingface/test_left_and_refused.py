"""What cannot be served is refused by name, and what is not recognised is left and said."""

import pytest
import torch

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import feed_forward, make_memory_efficient, restore
from memory_efficient_attention_pytorch.huggingface.attention import memory_efficient_attention
from memory_efficient_attention_pytorch.huggingface.visibility import NAME, memory_efficient_mask

from .models import small_model, tokens
from .steps import assert_same_step, step

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("chunks_of_a_few_tokens"),
]


def test_what_cannot_be_served_is_refused_by_name():
    model, ids = small_model("Llama"), tokens()
    with pytest.raises(ValueError, match="one that make_memory_efficient changed"):
        restore(model)
    make_memory_efficient(model)
    with pytest.raises(ValueError, match="model"):
        make_memory_efficient(model)
    with pytest.raises(NotImplementedError, match="LlamaAttention of layer 0: output_attentions"):
        model(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"labels: expected a number for each of the logits, \(2, 5\), got \(2, 23\)"):
        model(input_ids=ids, labels=ids, logits_to_keep=5)
    with pytest.raises(ValueError, match="a model of transformers"):
        make_memory_efficient(torch.nn.Linear(2, 2))


def test_a_model_whose_mask_would_be_lost_keeps_its_attention():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)).train()
    ids = tokens()
    expected = step(model, ids, labels=ids)
    report = make_memory_efficient(model)
    assert "makes its own masks, which would be lost" in dict(report.left)["attention"]
    assert model.config._attn_implementation != NAME
    assert_same_step(step(model, ids, labels=ids), expected, 2e-5)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"attention_mask": None}, "it passes no mask for 2 queries and 5 keys"),
        ({"attention_mask": memory_efficient_mask(1, 3, 5, q_offset=2)}, "its mask is for 3 × 5 tokens, not 2 × 5"),
        ({"cache": object()}, "a paged cache is not supported"),
        ({"softcap": 2.0, "position_bias": torch.zeros(1, 1, 2, 5)}, "softcap: not together with a bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"indices": torch.zeros(1, 2, 1, dtype=torch.int32)}, "keys that an indexer chose"),
    ],
)
def test_attention_that_would_be_wrong_is_refused_by_the_layer(given, why):
    layer = small_model("Llama").model.layers[1].self_attn
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    arguments = {"attention_mask": memory_efficient_mask(1, 2, 5, q_offset=3), **given}
    with pytest.raises(NotImplementedError, match=f"LlamaAttention of layer 1: .*{why}"):
        memory_efficient_attention(layer, query, key, key, **arguments)


def test_what_is_not_recognised_is_left_and_said():
    report = make_memory_efficient(small_model("GptOss"))
    assert all("experts" in why for _, why in report.left)
    assert len(report.left) == 2
    assert "mixture of experts" in str(report)


def test_a_model_without_layers_to_checkpoint_is_told_so():
    from transformers import LlamaConfig, PreTrainedModel

    class Bare(PreTrainedModel):
        config_class = LlamaConfig
        supports_gradient_checkpointing = True

        def __init__(self, config):
            super().__init__(config)
            self.linear = torch.nn.Linear(2, 2)

    assert ("layers", "Bare has none that can be checkpointed") in make_memory_efficient(Bare(LlamaConfig())).left


class Causal(torch.nn.Module):
    """Linear layers alone, and every token sees those before it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 9), torch.nn.Linear(9, 4)

    def forward(self, x):
        return self.down(self.up(x).cumsum(1))


def test_what_mixes_tokens_is_not_cut():
    found = list(feed_forward.candidates(torch.nn.ModuleDict({"mixer": Causal()})))
    assert [(name, why) for name, _, why in found] == [("mixer", "a token's output depends on other tokens")]


def test_a_cache_that_checkpoints_drop_is_refused():
    model, ids = small_model("Llama"), tokens()
    with torch.no_grad():
        cache = model.eval()(input_ids=ids[:, :9], use_cache=True).past_key_values
    make_memory_efficient(model.train())
    with pytest.raises(NotImplementedError, match=r"not 14 × 14 \(checkpointed layers are given no cache\)"):
        model(input_ids=ids[:, 9:], past_key_values=cache, labels=ids[:, 9:])

"""Our Transformer as a transformers model, which loads, saves, trains and generates as any other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from ..common.divided import refuse_divided
from ..common.errors import require
from ..layers.cache import KVCache
from ..models.config import KNOBS
from ..models.transformer import Transformer


class MemoryEfficientConfig(PreTrainedConfig):
    """Holds the fields of :class:`TransformerConfig`, with ``causal`` true, and those of any ``PreTrainedConfig``.

    Examples:
        >>> from memory_efficient_attention_pytorch.huggingface import MemoryEfficientConfig
        >>> config = MemoryEfficientConfig(num_tokens=256, dim=64, depth=2, heads=4, dim_head=16)
        >>> config.hidden_size
        64
    """

    model_type = "memory_efficient_transformer"
    attribute_map = {  # noqa: RUF012  (transformers declares it so)
        "vocab_size": "num_tokens",
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "max_position_embeddings": "max_seq_len",
    }
    num_tokens: int = 256
    max_seq_len: int = 1024
    dim: int = 512
    depth: int = 6
    dim_head: int = 64
    heads: int = 8
    ff_mult: int = 4
    ff_chunks: int | None = None
    use_flash_attn: bool = True
    kv_heads: int | None = None
    window: Any = None
    positions: str = "learned"
    rotary_base: float = 10000.0
    dropout: float = 0.0
    head_chunks: int | None = None
    keep_attention: bool | str = False
    reversible: bool = True
    exact: bool = False
    tie_embeddings: bool = False
    loss_chunk_size: int | None = None
    memory_efficient: bool = True
    q_bucket_size: int = 512
    k_bucket_size: int = 1024
    backend: str = "auto"
    tie_word_embeddings: bool = False  # the Transformer ties by having one weight

    def transformer_keywords(self) -> dict[str, Any]:
        """Return the keywords of :class:`Transformer`."""
        chosen = {name: getattr(self, name) for name in KNOBS if name != "causal"}
        if isinstance(chosen["window"], list):
            chosen["window"] = tuple(chosen["window"])  # JSON has no tuples
        return chosen | {"causal": True}


class MemoryEfficientForCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps a causal :class:`Transformer`, its ``net``, in transformers' interface.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch.huggingface import MemoryEfficientConfig, MemoryEfficientForCausalLM
        >>> config = MemoryEfficientConfig(num_tokens=256, dim=64, depth=2, heads=4, dim_head=16)
        >>> model = MemoryEfficientForCausalLM(config)
        >>> tokens = torch.randint(1, 256, (1, 100))
        >>> model(input_ids=tokens, labels=tokens).loss.backward()
        >>> model.generate(tokens[:, :10], max_new_tokens=5, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 15])
    """

    config_class = MemoryEfficientConfig
    base_model_prefix = "net"
    supports_gradient_checkpointing = False

    def __init__(self, config: MemoryEfficientConfig) -> None:
        super().__init__(config)
        require(not config.tie_word_embeddings, "tie_word_embeddings", "False; tie_embeddings ties them here", True)
        self.net = Transformer(**config.transformer_keywords())
        self._loaded = any(parameter.is_meta for parameter in self.parameters())  # its weights come from a file
        self.post_init()

    @classmethod
    def of(cls, net: Transformer, keywords: dict[str, Any], **others: Any) -> MemoryEfficientForCausalLM:
        """Return a model with ``net``'s weights. keywords: those ``net`` was built with; others: of the configuration.

        Raises ValueError if ``net`` is not causal.
        """
        require(net.causal, "net", "a causal Transformer", "another")
        own = {name: value for name, value in keywords.items() if name != "causal"}
        model = cls(MemoryEfficientConfig(**own, **others))
        model.net.load_state_dict(net.state_dict())
        model.train(net.training)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights that a file lacks; without a file the layers have initialised themselves."""
        reset: Any = getattr(module, "reset_parameters", None)
        if self._loaded and module is self.net.token_emb:
            self.net.initialise_embedding()
        elif self._loaded and reset is not None:
            reset()

    def get_input_embeddings(self) -> nn.Module:
        return self.net.token_emb

    def get_output_embeddings(self) -> nn.Module | None:
        return self.net.to_logits[1] if len(self.net.to_logits) > 1 else None

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.net.token_emb, self.net.num_tokens = value, value.num_embeddings

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.net.to_logits[1] = value

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **ignored: Any) -> Tensor | None:
        """The padding alone, where transformers would make a mask of four dimensions for a cache of fixed size."""
        return attention_mask

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the loss alone if labels are given, which are shifted here, else the logits.

        Args:
            input_ids: ``(b, n)``. attention_mask: ``(b, tokens in the cache + n)``, 0 at padding.
            position_ids: those that follow from the mask, as generation gives them.
            past_key_values: a cache of transformers, growing or of fixed size (without gradients).
            inputs_embeds: ``(b, n, dim)``, in the place of input_ids.
            labels: ``(b, n)``, ignore_index for none. Or as the keyword shift_labels, shifted already.
            use_cache: True returns a cache that grows where none is given.
            num_items_in_batch: what the sum of losses is divided by, where not by the number of labels.

        Raises:
            ValueError: other positions, embeddings of another dtype, a cache with labels or gradients, or what it does
                not give: attention weights and hidden states.
            NotImplementedError: tokens that are divided over processes, which ``net`` takes.
        """
        refuse_divided("MemoryEfficientForCausalLM (not its net)")
        self._check_outputs(kwargs)
        x = input_of(input_ids, inputs_embeds)
        if inputs_embeds is not None:
            self.net.check_dtype("inputs_embeds", inputs_embeds)
        flat = attention_mask is None or attention_mask.dim() == 2
        require(flat, "attention_mask", "(b, tokens), of padding alone", getattr(attention_mask, "shape", None))
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        _check_positions(position_ids, mask, before, x)
        shift_labels: Tensor | None = kwargs.get("shift_labels")  # no argument, which Trainer would take for labels
        if labels is not None or shift_labels is not None:
            require(past_key_values is None, "labels", "none with a cache", "both")
            if shift_labels is None:
                assert labels is not None
                shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
            loss = self.net(x, labels=shift_labels, mask=mask, ignore_index=ignore_index)
            if num_items_in_batch is not None:
                loss = loss * (shift_labels != ignore_index).sum() / num_items_in_batch
            return CausalLMOutputWithPast(loss=loss)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cache = None if past_key_values is None else _Behind(past_key_values, before)
        logits = self.net(x, mask=mask, cache=cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = logits[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept]
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _check_outputs(self, asked_for: dict[str, Any]) -> None:
        for name in ("output_attentions", "output_hidden_states"):
            asked = asked_for.get(name)
            asked = getattr(self.config, name, False) if asked is None else asked
            require(not asked, name, "False: tokens come in, and logits or a loss go out", asked)


def input_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    expected = "tokens (b, n), or inputs_embeds (b, n, dim) in their place"
    require(input_ids is None or inputs_embeds is None, "input_ids", expected, "both")
    x = input_ids if inputs_embeds is None else inputs_embeds
    require(x is not None, "input_ids", expected, "neither")
    assert x is not None
    return x


def _check_positions(given: Tensor | None, mask: Tensor | None, before: int, x: Tensor) -> None:
    if given is None:
        return
    total = before + x.shape[1]
    seen = torch.ones(1, total, dtype=torch.bool, device=given.device) if mask is None else mask
    expected = (torch.arange(total, device=given.device) - seen.int().argmax(1, keepdim=True))[:, before:]
    same = bool(((given == expected) | ~seen[:, before:]).all())
    require(same, "position_ids", "those that follow from attention_mask", "others, as for packed sequences")


class _Behind(KVCache):
    """Wraps a transformers cache in :class:`KVCache`'s interface; layers are numbered in the order of their calls."""

    def __init__(self, cache: Cache, length: int) -> None:
        super().__init__()
        self.cache, self.length, self.asked = cache, length, 0

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor, left: int | None = None) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.update(k, v, self.asked)
        self.asked += 1
        total = self.length + k.shape[2]
        require(keys.shape[2] >= total, "past_key_values", "a cache that keeps every token", type(self.cache).__name__)
        keys, values = (t[:, :, :total] for t in (keys, values))  # of a cache of fixed size
        first = 0 if left is None else max(0, keys.shape[2] - left - k.shape[2])
        return keys[:, :, first:], values[:, :, first:]


AutoConfig.register(MemoryEfficientConfig.model_type, MemoryEfficientConfig, exist_ok=True)
AutoModelForCausalLM.register(MemoryEfficientConfig, MemoryEfficientForCausalLM, exist_ok=True)
# Where Trainer looks up by name whose labels to shift before it smooths them, a pipeline whether it knows the model:
# neither looks among registered models, and no function adds a name here. Entries that are there stay.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MemoryEfficientConfig.model_type, MemoryEfficientForCausalLM.__name__)

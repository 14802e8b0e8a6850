"""Small models of the installed transformers, with random weights and nothing downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "attention_dropout": 0.0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5, **SLIDING},
    "Gemma3": {"query_pre_attn_scalar": 8, **SLIDING},
    "Phi3": {},
    "GPT2": GPT2,
    "GPTNeoX": {},
    "Olmo2": {},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        **SLIDING,
    },
    "Granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "Cohere": {"logit_scale": 0.25},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Gemma4": "Gemma4TextConfig", "Inkling2": "Inkling2TextConfig"}
# Decoders beside those: the configuration, and what is left of them and why.
FIXED = "{}ForCausalLM has no exchangeable attention"
DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MORE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "Apertus": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"MLPs": "none was recognised"}),
    "Cohere2": ({"logit_scale": 0.25, **SLIDING}, {}),
    "Exaone4": (SLIDING, {}),
    "Gemma": ({}, {}),
    "Gemma4": (
        {
            **{"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2, "vocab_size_per_layer_input": 61},
            **{"hidden_size_per_layer_input": 8, "global_head_dim": 8},
        },
        {},
    ),
    "Glm4": ({}, {}),
    "Ministral": (SLIDING, {}),
    "Nemotron": ({}, {}),
    "Olmo3": (SLIDING, {}),
    "Phi": (DROPOUTS, {}),
    "SmolLM3": ({"no_rope_layers": [1, 0]}, {}),
    "StableLm": ({}, {}),
    "Starcoder2": ({"sliding_window": 6, "residual_dropout": 0.0, "embedding_dropout": 0.0}, {}),
    "Falcon": ({}, {"attention": FIXED.format("Falcon")}),
    "GPTJ": ({"rotary_dim": 8, **DROPOUTS}, {"attention": FIXED.format("GPTJ")}),
    "Mpt": ({}, {"attention": FIXED.format("Mpt"), "MLPs": "none was recognised"}),
}


def small_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    own = {**SMALL, **(MORE[kind][0] if kind in MORE else KINDS.get(kind, {})), **options}
    if kind in ("GPT2", "Falcon", "GPTJ", "Mpt"):  # these have the widths of old ones
        own = {k: v for k, v in own.items() if k not in ("num_key_value_heads", "head_dim", "intermediate_size")}
    if kind == "GptOss":
        own["experts_implementation"] = "eager"  # the others have no fp64
    config = getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(**own)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks") or "experts" in name:
                parameter.normal_(0, 0.3)
    return model.to(dtype).train()


OWN_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**OWN_WIDTHS, "image_size": 12, "patch_size": 4}
WORDS = {**OWN_WIDTHS, **{k: SMALL[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "experts_implementation": "eager"}
TEXT = {**SMALL, "vocab_size": 64}
SEEN = {**IMAGES, "image_size": 16}  # four images of four by four, or one of sixteen tokens
HALVES = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
BOTH = {**HALVES, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32, "vocab_size": 64, "dropout": 0.0}
OWN_LOSS = {"MLPs": "none was recognised", "loss": "its forward does not call its loss_function"}
# Of other families: the model's and its configuration's class, the configuration, and what is left of it and why.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
    "BERT": (
        "BertForMaskedLM",
        "BertConfig",
        {**WORDS, **UNDROPPED},
        {"MLPs": "none was recognised", "loss": "its loss is not ForCausalLMLoss"},
    ),
    "RoBERTa": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**WORDS, **UNDROPPED},
        {"MLPs": "none was recognised", "loss": "it has no language model head"},
    ),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**WORDS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6, "global_attn_every_n_layers": 2},
        {"loss": "its loss is not ForCausalLMLoss"},
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {**IMAGES, **UNDROPPED, "num_labels": 3},
        {"loss": "it has no language model head"},
    ),
    "BEiT": (
        "BeitForImageClassification",
        "BeitConfig",
        {**IMAGES, **UNDROPPED, "num_labels": 3, "drop_path_rate": 0.0, "use_relative_position_bias": True},
        {"loss": "it has no language model head"},
    ),
    "SigLIP": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": WORDS, "vision_config": IMAGES},
        {"loss": "it has no language model head"},
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**EXPERTS, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
        {f"model.layers.{i}.mlp": "a mixture of experts: tokens are routed, not chunked" for i in (0, 1)},
    ),
    "Qwen 2 MoE": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24, "output_router_logits": True},
        {f"model.layers.{i}.mlp": "a mixture of experts: tokens are routed, not chunked" for i in (0, 1)},
    ),
    "Qwen 3 MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**EXPERTS, "num_experts": 4, "mlp_only_layers": [0]},
        {"model.layers.1.mlp": "a mixture of experts: tokens are routed, not chunked"},
    ),
    "Gemma 3 with images": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**TEXT, "query_pre_attn_scalar": 8, **SLIDING},
            "vision_config": SEEN,
            "mm_tokens_per_image": 4,
            "image_token_index": 62,
            "boi_token_index": 61,
            "eoi_token_index": 63,
        },
        {},
    ),
    "PaliGemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {**TEXT, "model_type": "gemma"},
            "vision_config": {
                **SEEN,
                "model_type": "siglip_vision_model",
                "num_image_tokens": 16,
                "vision_use_head": False,
            },
            "image_token_index": 62,
            "projection_dim": 32,
        },
        {},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        {"loss": "its forward does not call its loss_function"},
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", {**BOTH, "max_position_embeddings": 64}, OWN_LOSS),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **BOTH,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
        },
        OWN_LOSS,
    ),
}


def of_family(name: str) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """A small model in fp64, the inputs of a step, and what is left of it."""
    kind, of_config, options, left = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, of_config)(**options))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "experts" in parameter_name or "gate" in parameter_name:
                parameter.normal_(0, 0.3)  # some leave them as the memory was
    ids = tokens()
    padding = torch.ones_like(ids)
    padding[0, 15:] = 0
    words = {"input_ids": ids, "attention_mask": padding}

    def pictured(first: int, last: int) -> dict[str, Any]:
        """An image in the place of these tokens, which see one another."""
        place = torch.zeros_like(ids)
        place[:, first:last] = 1
        image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        given = {"input_ids": ids.masked_fill(place == 1, 62), "token_type_ids": place, "pixel_values": image}
        return {**words, **given, "labels": ids}

    images = {"pixel_values": torch.randn(2, 3, 12, 12, dtype=torch.float64)}
    answers = {"labels": ids[:, :9].contiguous()}
    inputs = {
        "BEiT": {**images, "labels": torch.tensor([0, 2])},
        "ViT": {**images, "labels": torch.tensor([0, 2])},
        "SigLIP": {"input_ids": ids, **images, "return_loss": True},
        "RoBERTa": {**words, "labels": torch.tensor([0, 1])},
        "Gemma 3 with images": pictured(3, 7),
        "PaliGemma": {**(seen := pictured(0, 16)), "token_type_ids": 1 - seen["token_type_ids"]},  # 1: the answer
        "T5": {**words, **answers},
        "BART": {**words, **answers},
        "Whisper": {"input_features": torch.randn(2, 8, 24, dtype=torch.float64), **answers},
    }
    return model.double().train(), inputs.get(name, {**words, "labels": ids}), left


def tokens(batch: int = 2, length: int = 23, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


WIDER = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "num_hidden_layers": 3}
OF_GPT2 = {"vocab_size": 4000, "n_embd": 256, "n_layer": 3}
OF_GEMMA = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 256}


def wider_model(kind: str, length: int) -> Any:
    own = {"GPT2": OF_GPT2, "Gemma3": WIDER | OF_GEMMA}.get(kind, WIDER)
    return small_model(kind, torch.float32, max_position_embeddings=length, **own)


def build_step(kind: str, state: str, length: int) -> Any:
    """The model in this state with its gradients, and its step; a target of ``measure_peak``."""
    from memory_efficient_attention_pytorch.benchmarking.measure import zero_grads
    from memory_efficient_attention_pytorch.huggingface import make_memory_efficient, planning

    model = wider_model(kind, length)
    if state == planning.CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if state == planning.EFFICIENT:
        make_memory_efficient(model)
    zero_grads(model)
    ids = torch.randint(4000, (1, length))

    def step(n: int = length) -> None:
        model(input_ids=ids[:, :n], labels=ids[:, :n], use_cache=False).loss.backward()

    step(16)  # loads what PyTorch loads on first use
    return step

"""Fine-tune a model of transformers with a LoRA and Trainer on sequences that its memory did not allow.

    python examples/finetune_huggingface.py --model DIRECTORY --text FILE --tokens 16384

Without --model it builds a small Llama with random weights that reads bytes, and without --text it repeats a sentence:
nothing is downloaded. The adapter is written to --output.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from memory_efficient_attention_pytorch.huggingface import make_memory_efficient, restore


def small_llama(tokens: int):
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=tokens, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sequences(ids: list[int], tokens: int) -> list[dict[str, torch.Tensor]]:
    """The text cut into sequences of equal length; labels are the tokens, which the model shifts by itself."""
    cut = torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)
    return [{"input_ids": row, "labels": row} for row in cut]


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or name that from_pretrained takes")
    parser.add_argument("--text", type=Path, help="a file of text")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--accumulate", type=int, default=2, help="sequences for a step of the optimizer")
    parser.add_argument("--output", default="finetuned")
    chosen = parser.parse_args(arguments)

    text = chosen.text.read_text() if chosen.text else "The quick brown fox jumps over the lazy dog. " * chosen.tokens
    if chosen.model:
        model = AutoModelForCausalLM.from_pretrained(chosen.model)
        ids = AutoTokenizer.from_pretrained(chosen.model)(text)["input_ids"]
    else:
        model, ids = small_llama(chosen.tokens), list(text.encode())

    # Adapters first; then one call.
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    print(make_memory_efficient(model))

    options = TrainingArguments(
        output_dir=chosen.output, max_steps=chosen.steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=chosen.accumulate, learning_rate=1e-2 if chosen.model is None else 2e-4,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=sequences(ids, chosen.tokens))
    trainer.train()
    restore(model)
    model.save_pretrained(chosen.output)
    return trainer


if __name__ == "__main__":
    main()

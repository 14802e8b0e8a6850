"""Write a model that `mea train` trained as one of Hugging Face transformers, with its tokenizer.

  mea export runs/first exported

Then in Python, with transformers installed:

  import memory_efficient_attention_pytorch.huggingface
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("exported")
  tokenizer = AutoTokenizer.from_pretrained("exported")
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mea export RUN DIR [options]"
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("directory", metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--checkpoint", default="best", choices=("best", "last"), help="lowest validation loss or newest (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from ..huggingface.model import MemoryEfficientForCausalLM
    from ..huggingface.tokenizers import byte_tokenizer, tokenizer_of_file
    from ..training.model import model_keywords
    from ..training.run_directory import RunDirectory, load_run

    directory = Path(args.directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"DIR: expected a new or an empty directory, got {directory}")
    loaded = load_run(args.run, checkpoint=args.checkpoint)
    own, end = loaded.tokenizer, loaded.tokenizer.end_id
    keywords = model_keywords(loaded.config, own.num_tokens)
    model = MemoryEfficientForCausalLM.of(loaded.model, keywords, eos_token_id=end, pad_token_id=end)
    file = RunDirectory(args.run).tokenizer
    tokenizer = tokenizer_of_file(file, end) if file.is_file() else byte_tokenizer(end)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"written to {directory}")
    return 0

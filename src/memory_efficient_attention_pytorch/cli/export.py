"""Write a model that `mea train` trained as one of Hugging Face transformers, with its tokenizer.

  mea export runs/first exported

Then in Python, with transformers installed:

  import memory_efficient_attention_pytorch.huggingface
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("exported")
  tokenizer = AutoTokenizer.from_pretrained("exported")
"""

import argparse
import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .terminal import note


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
    from ..training.files import WRITE_ERRORS, RunError, directory_written_atomically
    from ..training.model import model_keywords
    from ..training.run_directory import RunDirectory, load_run

    directory = Path(args.directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"DIR: expected a new or an empty directory, got {directory}")
    try:
        args.directory.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"DIR: expected a name in UTF-8, for safetensors, got {args.directory!r}") from error
    loaded = load_run(args.run, checkpoint=args.checkpoint, report=partial(note, "mea export"))
    own, end = loaded.tokenizer, loaded.tokenizer.end_id
    keywords = model_keywords(loaded.config, own.num_tokens)
    model = MemoryEfficientForCausalLM.of(loaded.model, keywords, eos_token_id=end, pad_token_id=end)
    file = RunDirectory(args.run).tokenizer
    tokenizer = tokenizer_of_file(file, end) if file.is_file() else byte_tokenizer(end)
    try:
        with _filled(directory) if directory.exists() else directory_written_atomically(directory) as written:
            model.save_pretrained(written)
            tokenizer.save_pretrained(written)
    except WRITE_ERRORS as error:
        raise RunError(f"cannot write to {directory} ({error}): nothing was written") from error
    print(f"written to {directory}")
    return 0


@contextlib.contextmanager
def _filled(directory: Path) -> Iterator[Path]:
    """Yield a directory that is empty, and again if the block fails. It may be a mount point, or somebody's own."""
    try:
        yield directory
    except BaseException:
        for path in directory.iterdir():
            path.unlink()
        raise

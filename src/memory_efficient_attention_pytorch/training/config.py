"""The configuration of a training run, from a TOML file or the command line."""

import dataclasses
import functools
import os
import tomllib
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common.errors import nearest
from ..models.config import KNOBS, TransformerConfig, knob, value_type

FORMAT = 1
"""Version of the run directory's layout, written to `config.toml`."""


def _option(
    default: Any,
    help: str,
    group: str,
    low: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    unset: str = "",
) -> Any:
    metadata = knob(help, low=low, choices=choices, unset=unset) | {"group": group, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


_text = functools.partial(_option, group="text")
_optimisation = functools.partial(_option, group="optimisation")
_record = functools.partial(_option, group="logging and checkpoints")


def _model(name: str, default: Any = dataclasses.MISSING, **changed: Any) -> Any:
    """Return a field for a Transformer setting. default: the demonstration model's, else the Transformer's own."""
    if default is dataclasses.MISSING:
        default = getattr(TransformerConfig, name)
    return dataclasses.field(default=default, metadata={**KNOBS[name], "group": "model", **changed})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Holds everything that decides what a training run computes. None leaves a choice to `resources.resolve`.

    Raises ValueError, naming the key, what was expected and what came, for a value of the wrong type or out of range
    and for options that contradict each other.

    Examples:
        >>> from memory_efficient_attention_pytorch.training import TrainConfig
        >>> TrainConfig(data=("book.txt",), seq_len=8192).batch_size
        8
    """

    data: tuple[str, ...] = _text(
        (),
        "files, directories, .gz files or - for standard input; without it, the Python standard library's sources",
        metavar="PATH",
    )
    tokenizer: str | None = _text(
        None, "a Hugging Face tokenizers file (tokenizer.json) to use instead of bytes", metavar="FILE"
    )
    vocab_size: int | None = _text(
        None, "train a byte-level BPE of this many tokens on the data, instead of bytes", low=257
    )
    validation_fraction: float = _text(0.05, "part of the text held out for validation")

    dim: int = _model("dim", 192)
    depth: int = _model("depth", 4)
    heads: int = _model("heads", 6)
    dim_head: int = _model("dim_head", 32)
    kv_heads: int | None = _model("kv_heads")
    ff_mult: int = _model("ff_mult")
    seq_len: int = _option(256, "tokens in one training window", "model", low=2)
    window: int | None = _model("window", help="a token sees at most this many tokens before it", low=1)
    positions: str = _model("positions", "rotary")
    rotary_base: float = _model("rotary_base")
    dropout: float = _model("dropout")
    tie_embeddings: bool = _model("tie_embeddings")
    reversible: bool | None = _model("reversible", None, unset="where memory is short")
    exact: bool | None = _model("exact", None, unset="under mixed precision")
    keep_attention: bool | str | None = _model("keep_attention", None, unset="where it fits")
    head_chunks: int | None = _model("head_chunks", None, unset="chosen for the machine")
    ff_chunks: int | None = _model("ff_chunks", None, unset="chosen for the machine")
    loss_chunk_size: int | None = _model("loss_chunk_size")

    steps: int = _optimisation(300, "optimizer steps", low=1)
    batch_size: int = _optimisation(8, "windows in one batch of one process", low=1)
    accumulation: int = _optimisation(1, "batches whose gradients are averaged before a step", low=1)
    learning_rate: float = _optimisation(3e-3, "peak learning rate", low=0)
    final_learning_rate: float = _optimisation(
        0.1, "learning rate at the end of the cosine decay, as a part of the peak", low=0
    )
    warmup_steps: int = _optimisation(30, "steps over which the learning rate rises", low=0)
    weight_decay: float = _optimisation(0.1, "AdamW's weight decay, on matrices only", low=0)
    beta1: float = _optimisation(0.9, "AdamW's decay of the gradient's mean", low=0)
    beta2: float = _optimisation(0.95, "AdamW's decay of the gradient's square", low=0)
    clip: float = _optimisation(1.0, "largest norm of the gradient; 0 turns clipping off", low=0)
    precision: str = _optimisation(
        "auto",
        "arithmetic of the forward pass; auto: bf16 on an accelerator that has it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = _optimisation("auto", "auto: the accelerator if there is one", choices=("auto", "cpu"))
    shard: bool | None = _optimisation(
        None,
        "shard weights, gradients and optimizer state over the processes (FSDP2), gathered block by block",
        unset="where a memory budget asks for it",
    )
    context_parallel: int | None = _optimisation(
        None,
        "processes over which the tokens of each window are divided; other processes take other windows",
        low=1,
        unset="1, or more where a memory budget asks for it",
    )
    memory_budget: str | None = _optimisation(
        None,
        "memory the process may take, 8GiB, 8GB, 8000M or auto (what is free): the fastest settings that fit are "
        "chosen among reversible, exact, keep-attention, head-chunks, ff-chunks and loss-chunk-size and, with several "
        "processes, shard and context-parallel, where they are not given",
        metavar="SIZE",
    )
    seed: int = _optimisation(0, "seed of weights, batches, dropout and the validation split", low=0)

    evaluate_every: int = _record(50, "steps between validations", low=1)
    evaluation_windows: int = _record(64, "windows of the fixed validation set", low=1)
    sample_every: int = _record(100, "steps between samples; 0 for none", low=0)
    sample_tokens: int = _record(160, "tokens in a sample", low=1)
    checkpoint_every: int = _record(50, "steps between checkpoints", low=1)
    keep: int = _record(2, "newest checkpoints to keep, besides the best one", low=1)
    tensorboard: bool = _record(False, "also write TensorBoard files to the run directory")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        _check_combination(self)

    def updated(self, values: Mapping[str, Any]) -> "TrainConfig":
        """Return a copy with these values. Raises ValueError for an unknown key, naming the nearest known one."""
        reject_unknown(values, where="the options")
        return dataclasses.replace(self, **values)


def known_keys() -> list[str]:
    """Return the names of TrainConfig's fields."""
    return [field.name for field in dataclasses.fields(TrainConfig)]


def reject_unknown(values: Mapping[str, Any], *, where: str) -> None:
    """Raise ValueError for the first key of `values` that TrainConfig does not have."""
    for key in values:
        if key not in known_keys():
            raise ValueError(f"unknown key {key!r} in {where}{nearest(key, known_keys())}")


def load_config(path: Path | str) -> TrainConfig:
    """Read a TOML file of TrainConfig's keys. Missing keys take their defaults.

    Raises ValueError if the file is missing, is not TOML, has an unknown key or an invalid value, or belongs to a run
    in a format that this version does not read.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from memory_efficient_attention_pytorch.training import load_config
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "run.toml")
        ...     written = path.write_text("dim = 256")
        ...     load_config(path).dim
        256
    """
    return TrainConfig(**read_values(path))


def read_values(path: Path | str) -> dict[str, Any]:
    """Return the keys and values that a TOML file sets, checked for unknown keys and the format's version."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # among them TOMLDecodeError and UnicodeDecodeError
        raise ValueError(f"the configuration {path} is not valid TOML: {error}") from error
    version = values.pop("format", FORMAT)
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version!r} and this version reads format {FORMAT}: "
            "use the version of memory-efficient-attention-pytorch that wrote it"
        )
    reject_unknown(values, where=str(path))
    return {name: _each(value, _from_toml) if name in _PATHS else value for name, value in values.items()}


def dump_config(config: TrainConfig) -> str:
    """Return the configuration as TOML, with help as comments; None becomes a comment, since TOML has no such value."""
    import tomli_w

    lines = [f"format = {FORMAT}"]
    group = None
    for field in dataclasses.fields(config):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"# {group}"]
        value = getattr(config, field.name)
        value = _each(value, _to_toml) if field.name in _PATHS else value
        text = f"# {field.name} =" if value is None else tomli_w.dumps({field.name: value}).rstrip()
        unset = f"; default: {field.metadata['unset']}" if field.metadata["unset"] else ""
        lines.append(f"{text}  # {field.metadata['help']}{unset}")
    return "\n".join(lines) + "\n"


_PATHS = ("data", "tokenizer")


def _each(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, list | tuple):
        return [change(item) if isinstance(item, str) else item for item in value]
    return change(value) if isinstance(value, str) else value


def _to_toml(path: str) -> str:
    """Return the path or, if it is not UTF-8 as TOML must be, a URI with its bytes (RFC 8089)."""
    utf8 = path.encode(errors="ignore").decode() == path
    return path if utf8 else Path(path).absolute().as_uri()


def _from_toml(path: str) -> str:
    uri = path.removeprefix("file://")
    return path if uri == path else os.fsdecode(urllib.parse.unquote_to_bytes(uri))


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return the value in the field's type. Raises ValueError for one that is not of it, or out of range."""
    kind = value_type(TrainConfig, field.name)
    if value is None and field.default is None:
        return None
    if kind is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{field.name} must be a list of strings, got {value!r}")
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    low, choices = field.metadata["low"], field.metadata["choices"]
    if kind is bool and choices and (isinstance(value, bool) or value in choices):
        return value
    if type(value) is not kind:
        others = "".join(f' or "{choice}"' for choice in choices) if kind is bool else ""
        raise ValueError(f"{field.name} must be {_NAMES[kind]}{others}, got {value!r}")
    if isinstance(value, int) and value >= 2**63:
        raise ValueError(f"{field.name} must be below 2**63, got {value}")
    # `not >=` instead of `<`, so that NaN fails too.
    if low is not None and (not value >= low or value == float("inf")):
        raise ValueError(f"{field.name} must be a finite number of at least {low}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(
            f"{field.name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}"
        )
    return value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


_MOST = {"depth": 2**16, "heads": 2**16, "vocab_size": 2**24, "num_tokens": 2**24, "shards": 2**16, "context": 2**16}
"""Upper limits of counts whose parts are created one by one."""

_MOST_NUMBERS = 2**48
"""Elements of a tensor: more than any machine holds, and far from overflow."""


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise ValueError for sizes that no machine can hold, before any code allocates or multiplies them.

    sizes: fields of :class:`TrainConfig`, and what else `mea plan` counts.
    """
    for name, most in _MOST.items():
        if (sizes.get(name) or 0) > most:
            raise ValueError(f"{name} must be at most {most}, got {sizes[name]}")
    width = max(sizes["dim"] * sizes["ff_mult"], sizes["heads"] * sizes["dim_head"])
    tokens = sizes["batch_size"] * sizes["seq_len"]
    for names, numbers in {
        "dim, ff_mult, heads and dim_head": sizes["dim"] * width,
        "dim and num_tokens": sizes["dim"] * sizes.get("num_tokens", 1),
        "batch_size and seq_len": tokens * width,
        "accumulation, batch_size and seq_len": sizes.get("accumulation", 1) * tokens * 256,
    }.items():
        if numbers > _MOST_NUMBERS:
            raise ValueError(f"{names} make {numbers:.1e} numbers, more than any machine holds: choose smaller sizes")


def _check_combination(config: TrainConfig) -> None:
    check_sizes(vars(config))
    if "" in map(str, config.data):
        raise ValueError("data: expected names of files and directories, got an empty one")
    if config.tokenizer is not None and config.vocab_size is not None:
        raise ValueError("tokenizer and vocab_size contradict each other: give a tokenizer's file or have one trained")
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {config.validation_fraction}")
    if config.kv_heads is not None and config.heads % config.kv_heads:
        raise ValueError(f"kv_heads must divide heads ({config.heads}), got {config.kv_heads}")
    if config.positions == "rotary" and config.dim_head % 2:
        raise ValueError(f"rotary positions need an even dim_head, got {config.dim_head}")
    if config.exact and config.reversible is False:
        raise ValueError("exact and no reversible contradict each other: exact is a way of rebuilding activations")
    for name, divides in {"shard": config.shard, "context_parallel": (config.context_parallel or 1) > 1}.items():
        if divides and config.precision == "fp16":
            raise ValueError(f"{name} goes with precision fp32 and bf16, got fp16")
    if config.memory_budget not in (None, "auto"):
        from ..common.sizes import parse_size

        parse_size(config.memory_budget, "memory_budget")
    for name in ("dropout", "beta1", "beta2"):
        if not getattr(config, name) < 1:
            raise ValueError(f"{name} must be below 1, got {getattr(config, name)}")
    if config.final_learning_rate > 1:
        raise ValueError(f"final_learning_rate is a part of the peak, from 0 to 1, got {config.final_learning_rate}")
    if config.learning_rate == 0:
        raise ValueError("learning_rate must be above 0, got 0.0")
    if config.rotary_base == 0:
        raise ValueError("rotary_base must be above 0, got 0.0")
    if list(config.data).count("-") > 1:
        raise ValueError("data names standard input (-) more than once")

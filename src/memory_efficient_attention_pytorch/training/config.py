"""One dataclass holds everything about a training run, whether it came from a TOML file or the command line."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the run directory's layout, written to `config.toml`."""


def _option(default: Any, help: str, *, group: str, low: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "low": low, "choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a training run computes. Where None stands, `resources.resolve` may choose.

    Raises ValueError, naming the key, what was expected and what came, for a value of the wrong type or out of range
    and for options that contradict each other.
    """

    data: tuple[str, ...] = _option(
        (),
        "files, directories, .gz files or - for standard input; without it, the Python standard library's sources",
        group="text",
    )
    tokenizer: str | None = _option(
        None, "a Hugging Face tokenizers file (tokenizer.json) to use instead of bytes", group="text"
    )
    vocab_size: int | None = _option(
        None, "train a byte-level BPE of this many tokens on the data, instead of bytes", group="text", low=257
    )
    validation_fraction: float = _option(0.05, "part of the text held out for validation", group="text")

    dim: int = _option(192, "width of the model", group="model", low=1)
    depth: int = _option(4, "number of blocks", group="model", low=1)
    heads: int = _option(6, "attention heads", group="model", low=1)
    dim_head: int = _option(32, "width of one head", group="model", low=1)
    kv_heads: int | None = _option(
        None, "key and value heads, a divisor of heads; default: heads", group="model", low=1
    )
    ff_mult: int = _option(4, "width of the feed-forward's hidden layer, in units of dim", group="model", low=1)
    seq_len: int = _option(256, "tokens in one training window", group="model", low=2)
    window: int | None = _option(
        None, "a token sees at most this many tokens before it; default: all", group="model", low=1
    )
    positions: str = _option(
        "rotary", "how positions are told", group="model", choices=("rotary", "learned", "alibi", "none")
    )
    dropout: float = _option(0.0, "dropout of the attention's weights", group="model", low=0)
    tie_embeddings: bool = _option(False, "use the token embedding for the output layer too", group="model")
    reversible: bool | None = _option(
        None, "rebuild activations in backward instead of storing them; default: on", group="model"
    )
    exact: bool | None = _option(None, "rebuild activations bit for bit; default: under mixed precision", group="model")
    keep_attention: bool | str | None = _option(
        None,
        "keep attention's outputs for backward, which is faster and takes memory; cpu: in host memory; default: off",
        group="model",
        choices=("cpu",),
    )
    head_chunks: int | None = _option(
        None, "pieces the attention is computed in; default: chosen for the machine", group="model", low=1
    )
    ff_chunks: int | None = _option(
        None, "pieces the feed-forward is computed in; default: chosen for the machine", group="model", low=1
    )
    loss_chunk_size: int | None = _option(
        None, "tokens whose logits exist at once; default: by the size of the vocabulary", group="model", low=1
    )

    steps: int = _option(300, "optimizer steps", group="optimisation", low=1)
    batch_size: int = _option(8, "windows in one batch of one process", group="optimisation", low=1)
    accumulation: int = _option(1, "batches whose gradients are averaged before a step", group="optimisation", low=1)
    learning_rate: float = _option(3e-3, "peak learning rate", group="optimisation", low=0)
    final_learning_rate: float = _option(
        0.1, "learning rate at the end of the cosine decay, as a part of the peak", group="optimisation", low=0
    )
    warmup_steps: int = _option(30, "steps over which the learning rate rises", group="optimisation", low=0)
    weight_decay: float = _option(0.1, "AdamW's weight decay, on matrices only", group="optimisation", low=0)
    beta1: float = _option(0.9, "AdamW's decay of the gradient's mean", group="optimisation", low=0)
    beta2: float = _option(0.95, "AdamW's decay of the gradient's square", group="optimisation", low=0)
    clip: float = _option(1.0, "largest norm of the gradient; 0 turns clipping off", group="optimisation", low=0)
    precision: str = _option(
        "auto",
        "arithmetic of the forward pass; auto: bf16 on an accelerator that has it, else fp32",
        group="optimisation",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = _option(
        "auto", "auto: the accelerator if there is one", group="optimisation", choices=("auto", "cpu")
    )
    memory_budget: str | None = _option(
        None,
        "memory the process may take, 8GiB, 8GB, 8000M or auto (what is free): the fastest settings that fit are "
        "chosen among reversible, exact, keep-attention, head-chunks, ff-chunks and loss-chunk-size where they are not "
        "given",
        group="optimisation",
    )
    seed: int = _option(0, "seed of weights, batches, dropout and the validation split", group="optimisation", low=0)

    evaluate_every: int = _option(50, "steps between validations", group="watching", low=1)
    evaluation_windows: int = _option(64, "windows of the fixed validation set", group="watching", low=1)
    sample_every: int = _option(100, "steps between samples; 0 for none", group="watching", low=0)
    sample_tokens: int = _option(160, "tokens in a sample", group="watching", low=1)
    checkpoint_every: int = _option(50, "steps between checkpoints", group="watching", low=1)
    keep: int = _option(2, "checkpoints kept, the newest; the best is kept besides", group="watching", low=1)
    tensorboard: bool = _option(False, "write TensorBoard's files to the run directory too", group="watching")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        _check_combination(self)

    @property
    def batch_tokens(self) -> int:
        """Tokens that one process trains on in one optimizer step."""
        return self.batch_size * self.seq_len * self.accumulation

    def updated(self, values: Mapping[str, Any]) -> "TrainConfig":
        """A copy with `values` in place. Raises ValueError for an unknown key, with the nearest known one."""
        reject_unknown(values, where="the options")
        return dataclasses.replace(self, **values)


def option_type(field: dataclasses.Field) -> tuple[type, bool]:
    """The type of a field's value and whether None is allowed; `tuple` stands for a tuple of strings.

    Of a switch (`bool`) that has choices too, each of them is a way of being on.
    """
    hint = typing.get_type_hints(TrainConfig)[field.name]
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [typing.get_origin(kind) or kind for kind in alternatives if kind is not types.NoneType]
    return plain[0], types.NoneType in alternatives


def known_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(TrainConfig)]


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)", or nothing when no known name resembles `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def reject_unknown(values: Mapping[str, Any], *, where: str) -> None:
    """Raise ValueError for the first key of `values` that TrainConfig does not have."""
    for key in values:
        if key not in known_keys():
            raise ValueError(f"unknown key {key!r} in {where}{nearest(key, known_keys())}")


def load_config(path: Path | str) -> TrainConfig:
    """Read a TOML file of TrainConfig's keys. Keys it leaves out take their defaults.

    Raises ValueError if the file is missing, is no TOML, has an unknown key or a value that does not fit, or was
    written beside a run in a format that this version does not read.
    """
    return TrainConfig(**read_values(path))


def read_values(path: Path | str) -> dict[str, Any]:
    """The keys and values that a TOML file sets, checked for unknown keys and the format's version."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration {path} is not valid TOML: {error}") from error
    version = values.pop("format", FORMAT)
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {version!r} and this version reads format {FORMAT}: "
            "use the version of memory-efficient-attention-pytorch that wrote it"
        )
    reject_unknown(values, where=str(path))
    return values


def dump_config(config: TrainConfig) -> str:
    """The configuration as TOML, with its help as comments; None is left out, since TOML has no such value."""
    lines = [f"format = {FORMAT}"]
    group = None
    for field in dataclasses.fields(config):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"# {group}"]
        value = getattr(config, field.name)
        text = f"{field.name} = {_toml(value)}" if value is not None else f"# {field.name} ="
        lines.append(f"{text}  # {field.metadata['help']}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # JSON's strings and numbers are TOML's, but for the one control character that JSON leaves bare.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type, or ValueError."""
    kind, optional = option_type(field)
    if value is None and optional:
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
    # Written so that NaN fails too.
    if low is not None and (not value >= low or value == float("inf")):
        raise ValueError(f"{field.name} must be a finite number of at least {low}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(
            f"{field.name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}"
        )
    return value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _check_combination(config: TrainConfig) -> None:
    if config.tokenizer is not None and config.vocab_size is not None:
        raise ValueError("tokenizer and vocab_size contradict each other: give a tokenizer's file or have one trained")
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {config.validation_fraction}")
    if config.kv_heads is not None and config.heads % config.kv_heads:
        raise ValueError(f"kv_heads must divide heads ({config.heads}), got {config.kv_heads}")
    if config.head_chunks is not None and config.heads % config.head_chunks:
        raise ValueError(f"head_chunks must divide heads ({config.heads}), got {config.head_chunks}")
    if config.positions == "rotary" and config.dim_head % 2:
        raise ValueError(f"rotary positions need an even dim_head, got {config.dim_head}")
    if config.exact and config.reversible is False:
        raise ValueError("exact and no reversible contradict each other: exact says how reversal rebuilds activations")
    if config.memory_budget not in (None, "auto"):
        from ..planner import parse_size

        parse_size(config.memory_budget, "memory_budget")
    for name in ("dropout", "beta1", "beta2"):
        if not getattr(config, name) < 1:
            raise ValueError(f"{name} must be below 1, got {getattr(config, name)}")
    if config.final_learning_rate > 1:
        raise ValueError(f"final_learning_rate is a part of the peak, from 0 to 1, got {config.final_learning_rate}")
    if config.learning_rate == 0:
        raise ValueError("learning_rate must be above 0, got 0.0")
    if list(config.data).count("-") > 1:
        raise ValueError("data names standard input (-) more than once")

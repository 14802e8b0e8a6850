"""The knobs of the Transformer: written once, and read by everything that builds or describes one."""

import argparse
import dataclasses
import inspect

import pytest

from memory_efficient_attention_pytorch import Attention, FlashAttention, Transformer
from memory_efficient_attention_pytorch.cli import plan as plan_command
from memory_efficient_attention_pytorch.models.config import KNOBS, SETTINGS, TransformerConfig
from memory_efficient_attention_pytorch.training.config import TrainConfig
from memory_efficient_attention_pytorch.training.model import model_keywords

TINY = {"num_tokens": 4, "max_seq_len": 4, "dim": 4, "depth": 1}


def test_the_transformers_keywords_are_the_configurations_fields():
    of_model, of_config = (inspect.signature(kind).parameters for kind in (Transformer, TransformerConfig))
    assert dict(of_model) == dict(of_config)
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in of_model.values())
    assert [name for name, each in of_model.items() if each.default is each.empty] == list(TINY)


@pytest.mark.parametrize("module", [Attention, FlashAttention])
def test_every_keyword_of_the_attention_is_a_knob(module):
    names = {each.name for each in inspect.signature(module).parameters.values() if each.kind is each.KEYWORD_ONLY}
    assert names <= KNOBS.keys()
    defaults = {name: each.default for name, each in inspect.signature(Attention).parameters.items()}
    # The Transformer's attention is memory-efficient, as in version 0.1.
    for name in defaults.keys() - {"dim", "memory_efficient"}:
        assert defaults[name] == getattr(TransformerConfig, name), name


def test_an_unknown_or_missing_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'heds'"):
        Transformer(**TINY, heds=2)
    with pytest.raises(TypeError, match="'depth'"):
        Transformer(num_tokens=4, max_seq_len=4, dim=4)


@pytest.mark.parametrize(
    "knob", [name for name, about in KNOBS.items() if about["low"] == 1] + ["positions"], ids=lambda name: name
)
def test_a_knob_out_of_range_is_named(knob):
    with pytest.raises(ValueError, match=f"^{knob}: expected "):
        Transformer(**{**TINY, knob: 0})


def test_every_knob_is_explained():
    assert TransformerConfig.__doc__ is not None
    for name, about in KNOBS.items():
        assert about["help"]
        assert f"{name}: {about['help']}" in TransformerConfig.__doc__


def test_without_options_the_plan_is_of_what_is_trained():
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    planned = plan_command._config(parser.parse_args([]))
    trained = model_keywords(TrainConfig(), num_tokens=256)
    assert planned == {name: trained[name] for name in trained if name not in ("max_seq_len", *SETTINGS)}
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= set(SETTINGS)

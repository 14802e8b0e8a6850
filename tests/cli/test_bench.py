"""`mea bench`: its options come to the settings of a comparison."""

import pytest

from memory_efficient_attention_pytorch.benchmarking.schedule import QUICK, Settings
from memory_efficient_attention_pytorch.benchmarking.shape import Shape
from memory_efficient_attention_pytorch.cli import bench
from memory_efficient_attention_pytorch.cli.parser import Parser


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", Settings()),
        ("--quick", QUICK),
        ("--lengths --depths --vocabularies", Settings(lengths=(), depths=(), vocabularies=())),
        ("--lengths 512 64 --dim 64 --keep-freed", Settings(base=Shape(dim=64), lengths=(512, 64), keep_freed=True)),
        ("--rounds 2 --step-limit 9 --device cuda", Settings(rounds=2, step_limit=9, device="cuda")),
    ],
    ids=str,
)
def test_options_change_only_what_they_name(options, expected):
    parser = Parser()
    bench.add_arguments(parser)
    assert bench._settings(parser.parse_args(options.split())) == expected

"""What a plan says of itself."""

from memory_efficient_attention_pytorch import plan
from memory_efficient_attention_pytorch.common.sizes import format_size

CONFIG = {"num_tokens": 256, "dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "causal": True}


def planned(**options):
    return plan(CONFIG, batch_size=1, seq_len=2048, device="cpu", threads=2, **options)


def test_a_plan_reads_as_one_line_and_not_as_its_operations():
    made = planned()
    largest = max(made.breakdown, key=made.breakdown.__getitem__)
    said = f"{format_size(made.peak_bytes)} at the peak ({made.peak.describe()}; cpu): {largest} "
    assert str(made).startswith(said)
    assert "\n" not in str(made)
    assert repr(made) == f"Plan({made})"
    assert repr(made.timeline) == f"Timeline({len(made.timeline.operations)} operations)"
    assert str(planned(budget="8GiB")).endswith("; fits in 8 GiB")
    too_large = planned(budget="1MiB")
    assert str(too_large).endswith(f"; does not fit in 1 MiB; {too_large.advice}")

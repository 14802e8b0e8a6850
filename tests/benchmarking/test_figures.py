"""How systems look in the figures."""

from memory_efficient_attention_pytorch.benchmarking.figures import MARKERS, OTHERS, OURS
from memory_efficient_attention_pytorch.benchmarking.systems import SYSTEMS


def test_every_system_has_a_look_of_its_own():
    ours = [system.name for system in SYSTEMS if system.ours]
    assert len(set(OURS)) == len(OURS) == len(ours)
    assert len(set(OTHERS)) == len(OTHERS) >= len(SYSTEMS) - len(ours)
    assert len(set(MARKERS)) == len(MARKERS)

"""How systems look in the figures."""

from memory_efficient_attention_pytorch.benchmarking.figures import OTHERS, OURS, styles
from memory_efficient_attention_pytorch.benchmarking.systems import SYSTEMS


def test_every_system_has_a_look_of_its_own():
    names = [*(system.name for system in SYSTEMS), "upstream", "x-transformers", "gpt2"]
    looks = styles(names)
    assert [*looks] == names
    assert len({look["color"] for look in looks.values()}) == len(names)
    ours = {system.name for system in SYSTEMS if system.ours}
    assert all(look["color"] in (OURS if name in ours else OTHERS) for name, look in looks.items())

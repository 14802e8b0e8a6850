"""benchmarks/scale.py: its page, what its simulation comes to where that is known, and the planner's figures in it."""

import json

import pytest

from tests.benchmarking.scripts import load_benchmark


@pytest.fixture(scope="module")
def scale():
    return load_benchmark("scale")


def test_the_page_has_the_tables_that_the_script_makes(scale, capsys):
    assert scale.main(["--check"]) == 0, capsys.readouterr().out


def test_other_tables_are_noticed(scale, tmp_path, monkeypatch, capsys):
    page = tmp_path / "scale.md"
    page.write_text(scale.PAGE.read_text().replace("| 1024 ", "| 1025 "))
    monkeypatch.setattr(scale, "PAGE", page)
    assert scale.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert scale.main([]) == 0
    assert page.read_text() == (scale.ROOT.parent / "docs" / "scale.md").read_text()


def test_another_machine_is_only_printed(scale, capsys):
    with pytest.raises(SystemExit):
        scale.main(["--network", "1e9"])
    capsys.readouterr()
    assert scale.main(["--print", "--network", "25e9"]) == 0
    hides_later = scale.hidden_table(scale.Machine(network=25e9))
    assert hides_later in capsys.readouterr().out
    assert hides_later != scale.hidden_table(scale.Machine())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_a_ring_takes_no_longer_than_its_arithmetic_from_where_it_is_said_to_hide(scale, kv_heads, backward):
    """But for its first keys and last gradients, which have less to hide behind; with half as many tokens it waits."""
    machine = scale.Machine(node=1, latency=0.0)
    sized = scale.Call(16, 0, 8, kv_heads, 64, 64, k_bucket=16)
    least = scale.hidden_from(sized, machine.network, machine.rate, backward)
    excess = []
    for tokens in (least / 2, 1.02 * least):
        call = scale.replace(sized, tokens=16 * 256 * round(tokens / 256))
        taken = scale.simulated_ring(call, machine, backward)
        last = backward * call.local * call.kv_values * call.full / machine.network
        excess.append((taken.seconds - last) / taken.computing)
    assert excess[0] > 1.3
    assert excess[1] <= 1 + 0.5 / call.processes


def test_a_simulated_ring_without_a_network_takes_its_arithmetic(scale):
    """Nobody waits for those that have more to do in a turn, whatever the slices."""
    machine = scale.Machine(nvlink=1e30, network=1e30, latency=0.0)
    for processes, device in ((2, "cpu"), (8, "cpu"), (8, "cuda"), (64, "cuda")):
        for backward in (False, True):
            taken = scale.simulated_ring(scale.call_of(processes, device=device), machine, backward)
            assert taken.seconds <= 1.001 * taken.computing


@pytest.mark.parametrize("window", [None, 3000])
def test_the_shares_of_a_ring_are_what_its_schedule_comes_to(scale, window):
    for processes in (2, 8, 64):
        call = scale.call_of(processes, left=window)
        for backward in (False, True):
            taken = scale.simulated_ring(call, scale.Machine(), backward)
            assert taken.sent == pytest.approx(scale.ring_bytes(call, backward), rel=1e-12)


@pytest.mark.slow
def test_the_memory_is_what_the_planner_says(scale):
    known = json.loads(scale.PLANNED.read_text())["plans"]
    (devices, context), *_ = scale.DEVICES
    for groups in scale.DEVICES[devices, context]:
        made = scale.plan_one(devices, context, groups)
        (kept,) = [
            plan for plan in known if all(plan[key] == made[key] for key in ("devices", "context", "head_chunks"))
        ]
        assert (kept["peak_bytes"], kept["way"]) == (made["peak_bytes"], made["way"])

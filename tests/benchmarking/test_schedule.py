"""Every system runs in turn, shapes from cheap to costly, and the forecast follows from the runs before."""

from dataclasses import replace

import pytest

from memory_efficient_attention_pytorch.benchmarking.schedule import Forecast, Job, Settings, schedule
from memory_efficient_attention_pytorch.benchmarking.shape import Shape
from memory_efficient_attention_pytorch.benchmarking.systems import find_systems

SYSTEMS = find_systems(["sdpa-stored", "sdpa-checkpoint"])
SETTINGS = Settings(
    base=Shape(seq_len=512), rounds=2, lengths=(1024, 256, 512), depths=(8, 2), vocabularies=(1000,), sweep_seq_len=128
)


def test_systems_alternate_and_the_compared_shape_is_not_measured_twice():
    jobs = schedule(SETTINGS, SYSTEMS)
    assert [job.system for job in jobs] == SYSTEMS * (len(jobs) // 2)
    described = [(job.experiment, job.round, job.shape.seq_len, job.shape.depth) for job in jobs[::2]]
    assert described == [
        ("length", 0, 256, 4),
        ("compare", 0, 512, 4),
        ("compare", 1, 512, 4),
        ("depth", 0, 128, 2),
        ("depth", 0, 128, 8),
        ("vocabulary", 0, 128, 2),
        ("length", 0, 1024, 4),
    ]


def test_the_forecast_grows_with_the_operations_and_not_beyond_the_limit():
    job = Job("length", 0, SYSTEMS[0], Shape(seq_len=4096), repeats=5)
    longer = replace(job, shape=Shape(seq_len=65536))
    forecast = Forecast(patience=10.0)
    assert forecast.step_seconds(job) is None
    forecast.learn(job, step_seconds=3.0, steps=2, run_seconds=8.0)
    assert forecast.step_seconds(job) == pytest.approx(3.0)
    # Attention is quadratic, the rest linear: 16 times the tokens take between 16 and 256 times as long.
    assert 16 * 3 < forecast.step_seconds(longer) < 256 * 3
    # One first step, then repetitions until 10 seconds have gone, and 2 seconds of starting the process.
    assert forecast.run_seconds(job, limit=100) == pytest.approx(2 + 3 * 4)
    assert forecast.run_seconds(longer, limit=48) == 0
    unknown = replace(job, system=SYSTEMS[1])
    assert forecast.step_seconds(unknown) == pytest.approx(3.0)


def test_a_window_makes_the_forecast_linear():
    window = find_systems(["ours-window"])[0]
    short, long = (Job("length", 0, window, Shape(seq_len=n), 1) for n in (65536, 131072))
    forecast = Forecast(patience=10.0)
    forecast.learn(short, 1.0, 1, 1.0)
    assert forecast.step_seconds(long) == pytest.approx(2.0)


def test_unknown_systems_and_settings_are_named():
    with pytest.raises(ValueError, match=r"systems: expected names among ours, .*got nothing-like-it"):
        find_systems(["ours", "nothing-like-it"])
    with pytest.raises(ValueError, match="rounds"):
        Settings(rounds=0)


@pytest.mark.parametrize(
    ("name", "wrong"), [("threads", 0), ("rounds", 0), ("step_limit", float("nan")), ("step_limit", -1.0)]
)
def test_settings_that_measure_nothing_are_refused(name, wrong):
    with pytest.raises(ValueError, match=f"{name}: expected a .*, got {wrong}"):
        Settings(**{name: wrong})

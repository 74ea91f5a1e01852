import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrate.engine.metrics import MetricsLog, Throughput, total_step_seconds


def write_steps(path: Path, first: int, last: int, *, resumed_after: int) -> None:
    log = MetricsLog(path, last_step=resumed_after)
    for step in range(first, last + 1):
        log.write({"step": step, "step_seconds": 0.5})
    log.close()


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_steps_after_the_checkpoint_are_cut_off_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 7, resumed_after=0)
    write_steps(path, 5, 9, resumed_after=4)
    assert steps_in(path) == list(range(1, 10))
    assert total_step_seconds(path) == 4.5


def test_torn_last_line_of_a_killed_writer_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3, resumed_after=0)
    with path.open("a") as file:
        file.write('{"step": 4, "st')
    write_steps(path, 4, 5, resumed_after=3)
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_throughput_counts_source_images_and_waiting() -> None:
    throughput = Throughput(100)
    throughput.add(2.0, 0.5)
    throughput.add(2.0, 0.5)
    assert (throughput.images_per_second, throughput.data_wait_percent, throughput.seconds_per_step) == (50, 25, 2)


@pytest.mark.parametrize("num_steps", [1, 2, 19, 50])
def test_percentiles_of_step_times_are_those_of_numpy(num_steps: int) -> None:
    seconds = np.random.default_rng(num_steps).lognormal(size=num_steps)
    throughput = Throughput(8)
    for value in seconds:
        throughput.add(float(value), 0.0)
    found = (throughput.step_seconds_p50, throughput.step_seconds_p95)
    assert found == pytest.approx(np.percentile(seconds, [50, 95]), rel=1e-12)  # two roundings of one formula


def test_one_slow_step_in_ten_shows_in_the_upper_percentile_only_until_it_leaves_the_window() -> None:
    throughput = Throughput(8, window=10)
    for seconds in (9.0, *[1.0] * 9):
        throughput.add(seconds, 0.0)
    assert throughput.step_seconds_p50 == 1
    assert throughput.step_seconds_p95 > 5
    throughput.add(1.0, 0.0)
    assert throughput.step_seconds_p95 == 1


def test_throughput_before_the_first_step_is_zero_everywhere() -> None:
    throughput = Throughput(8)
    assert (throughput.step_seconds_p50, throughput.step_seconds_p95, throughput.images_per_second) == (0, 0, 0)


# A parent that holds much starts a child that holds little: what the parent held is not the child's.
PEAK = """
import sys, subprocess
import torch
from orchestrate.engine.memory import peak_memory_gb
cpu = torch.device("cpu")
first = peak_memory_gb(cpu)
ballast = torch.ones(125_000_000, dtype=torch.float32)
held = peak_memory_gb(cpu)
small = "from types import SimpleNamespace as Device; from orchestrate.engine.memory import peak_memory_gb; "
small += "print(peak_memory_gb(Device(type='cpu')))"
child = float(subprocess.run([sys.executable, "-c", small], capture_output=True, text=True, check=True).stdout)
del ballast
print(first, held, peak_memory_gb(cpu), child)
"""


def test_peak_memory_grows_with_what_is_held_and_stays_when_it_is_freed() -> None:
    shown = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=60).stdout
    first, held, freed, child = map(float, shown.split())
    assert held - first == pytest.approx(0.5, abs=0.05)  # 125 million floats; torch starts its threads meanwhile
    assert freed == pytest.approx(held, abs=0.005)  # the kernel counts pages in batches
    assert child < 0.2

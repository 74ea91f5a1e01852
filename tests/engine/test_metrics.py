import json
from pathlib import Path

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

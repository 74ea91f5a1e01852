"""What a training writes while it runs: metrics.jsonl, TensorBoard events, and progress for people."""

import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from orchestrate.runs import write_text


class MetricsLog:
    """metrics.jsonl: one line for each step, each step once."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Open the log to go on after a step; lines of later steps, which will be made again, are cut off.

        Args:
            path: the file; it need not exist.
            last_step: step of the checkpoint that training resumes from, 0 for a new one.
        """
        if path.exists():
            write_text(
                path, "".join(f"{line}\n" for line in whole_lines(path) if json.loads(line)["step"] <= last_step)
            )
        self._file = path.open("a")

    def write(self, values: dict[str, Any]) -> None:
        """Append one step."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Put every line on the disk; before a checkpoint, so that none of its steps can be missing."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a JSONL file without the torn last one that a kill can leave."""
    text = path.read_text(errors="replace")
    lines = text.split("\n")[:-1]
    return [line for line in lines if line.startswith("{") and line.endswith("}")]


def total_step_seconds(path: Path) -> float:
    """Add up the seconds of all steps, data wait included; each step counts once, however often it was made."""
    return float(sum(json.loads(line)["step_seconds"] for line in whole_lines(path))) if path.exists() else 0.0


class EventLog:
    """TensorBoard event files; written every few steps."""

    every_steps = 10

    def __init__(self, folder: Path, *, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier attempt wrote after the checkpoint.
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add the numbers of a step."""
        if step % self.every_steps == 0:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Throughput:
    """Images per second, times of steps and the share of time spent waiting for data, over the last steps."""

    def __init__(self, global_batch: int, *, window: int = 50) -> None:
        self._global_batch = global_batch
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)

    def add(self, step_seconds: float, wait_seconds: float) -> None:
        """Count one step; `step_seconds` includes the wait."""
        self._steps.append((step_seconds, wait_seconds))

    @property
    def images_per_second(self) -> float:
        """Source images, not views, over all ranks."""
        return self._global_batch * len(self._steps) / max(sum(step for step, _ in self._steps), 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a step."""
        return sum(step for step, _ in self._steps) / max(len(self._steps), 1)

    @property
    def step_seconds_p50(self) -> float:
        """Time that half of the steps stayed below; of the window, as all numbers here."""
        return _percentile([step for step, _ in self._steps], 0.50)

    @property
    def step_seconds_p95(self) -> float:
        """Time that 19 of 20 steps stayed below: far above the median, something makes single steps wait."""
        return _percentile([step for step, _ in self._steps], 0.95)

    @property
    def data_wait_percent(self) -> float:
        """Part of the time in which the step waited for its batch."""
        return 100 * sum(wait for _, wait in self._steps) / max(sum(step for step, _ in self._steps), 1e-9)


def _percentile(values: list[float], part: float) -> float:
    """Interpolate between the two nearest values, as numpy does; 0 of no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class ProgressLine:
    """A progress bar on a terminal, a plain line every few seconds elsewhere."""

    every_seconds = 10.0

    def __init__(self, total_steps: int, *, first_step: int, stream: TextIO | None = None) -> None:
        self._total_steps, self._stream = total_steps, stream or sys.stdout
        self._last = 0.0
        self._bar: Any = None
        if self._stream.isatty():
            self._bar, self._task = _terminal_bar(total_steps, first_step)

    def show(self, step: int, *, loss: float, throughput: Throughput) -> None:
        """Show a step."""
        rate = throughput.images_per_second
        facts = f"loss {loss:.4g}  {rate:.0f} img/s  data-wait {throughput.data_wait_percent:.0f}%"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif time.monotonic() - self._last >= self.every_seconds or step == self._total_steps:
            self._last = time.monotonic()
            eta = (self._total_steps - step) * throughput.seconds_per_step
            print(f"step {step}/{self._total_steps}  {facts}  ETA {eta:.0f} s", file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _terminal_bar(total_steps: int, first_step: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
    bar = Progress(*columns)
    bar.start()
    return bar, bar.add_task("train", total=total_steps, completed=first_step, facts="")

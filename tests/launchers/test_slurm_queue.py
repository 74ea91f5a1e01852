"""What Slurm 22.05 printed (`slurm_22_05/`, recorded from a cluster with accounting), and what others print."""

import time
from pathlib import Path

import pytest

from orchestrate.launchers.slurm_queue import (
    QUEUE_FORMAT,
    Row,
    Run,
    node_list,
    parse_accounting,
    parse_queue,
    parse_time,
    run_of,
    state_word,
)

RECORDED = Path(__file__).with_name("slurm_22_05")
WIDTHS = {name: int(width) for name, width in (part.split(":") for part in QUEUE_FORMAT.split(","))}


def line(**fields: str) -> str:
    return "".join(fields.get(name, "N/A")[:width].ljust(width) for name, width in WIDTHS.items())


def only(**fields: str) -> Row:
    defaults = {"JobArrayID": "7", "JobID": "7", "State": "RUNNING", "RestartCnt": "0", "Name": "oc-a"}
    (row,) = parse_queue(line(**(defaults | fields)))
    return row


@pytest.fixture(scope="module")
def queue() -> dict[str, Row]:
    return {row.job: row for row in parse_queue((RECORDED / "squeue.txt").read_text())}


@pytest.fixture(scope="module")
def accounting() -> list[Run]:
    return parse_accounting((RECORDED / "sacct.txt").read_text())


def test_every_job_of_the_queue_is_read(queue: dict[str, Row]) -> None:
    states = {job: (row.name, row.state) for job, row in queue.items()}
    assert states == {
        "1": ("oc-done", "COMPLETED"),
        "2": ("oc-failed", "FAILED"),
        "3": ("oc-requeued", "PENDING"),
        "4": ("oc-cancelled", "CANCELLED"),
        "5": ("oc-never", "CANCELLED"),
        "6": ("oc-ärger | x", "COMPLETED"),
        "7_0": ("oc-array-1", "COMPLETED"),
        "7_1": ("oc-array-1", "COMPLETED"),
        "7_2": ("oc-array-1", "COMPLETED"),
        "7_3": ("oc-array-1", "COMPLETED"),
        "8": ("oc-mem", "RUNNING"),
        "9": ("line", "COMPLETED"),  # of a name with a line break
        "10": ("oc-time", "RUNNING"),
        "14": ("oc-twin", "RUNNING"),
        "15": ("oc-twin", "PENDING"),
        "16": ("oc-preempted", "RUNNING"),
        "17": ("urgent", "PENDING"),
    }


def test_times_nodes_and_restarts_are_read(queue: dict[str, Row]) -> None:
    done, requeued, preempted = queue["1"], queue["3"], queue["16"]
    assert (done.start, done.end, done.nodes) == (1795449491.0, 1795449491.0, ("m1", "m2"))
    assert (requeued.restarts, requeued.reason, requeued.held(1795449497.0)) == (1, "BeginTime", True)
    assert (requeued.submitted, requeued.nodes) == (1795449496.0, ())
    assert (preempted.preempted, preempted.nodes) == (1795449501.0, ("m3", "m4"))
    assert queue["15"].reason == "Dependency"


def test_last_element_of_an_array_has_the_array_s_id_for_its_own(queue: dict[str, Row]) -> None:
    assert [queue[f"7_{index}"].raw_job for index in range(4)] == ["11", "12", "13", "7"]


def test_runs_of_accounting_are_read(accounting: list[Run]) -> None:
    runs = {run.job: run for run in accounting}
    assert runs["4"] == Run("4", "4", "CANCELLED", 1795449491.0, 1795449496.0, ("m1",))
    assert runs["7_3"].raw_job == "7"
    assert runs["19"].nodes == ()
    assert [run.state for run in accounting if run.job == "16"] == ["PREEMPTED", "RUNNING"]


def test_each_run_of_a_job_is_found_by_its_start(accounting: list[Run]) -> None:
    first = run_of(accounting, "16", 1795449497.5)
    assert first is not None
    assert first.state == "PREEMPTED"
    assert run_of(accounting, "16", 1795449643.5) is None  # it lives
    assert run_of(accounting, "99", 1795449643.5) is None
    never = run_of(accounting, "19", None)
    assert never is not None
    assert never.state == "CANCELLED"


def test_nodes_whose_clocks_differ_find_their_runs() -> None:
    runs = [Run("1", "1", "NODE_FAIL", 1000.0, 2000.0, ("n1",)), Run("1", "1", "TIMEOUT", 2200.0, 3000.0, ("n2",))]
    assert run_of(runs, "1", 970.0) == runs[0]
    assert run_of(runs, "1", 1500.0) == runs[0]  # a slow prolog
    assert run_of(runs, "1", 2170.0) == runs[1]


def test_runs_that_follow_each_other_within_a_minute_are_told_apart() -> None:
    starts = (1000.0, 1030.0, 1055.0)
    runs = [Run("1", "1", "NODE_FAIL", start, start + 10, (f"n{start:.0f}",)) for start in starts]
    assert [run_of(runs, "1", start + 1.5) for start in starts] == runs
    assert [run_of(reversed(runs), "1", start - 5) for start in starts] == runs  # a clock that is late


@pytest.mark.parametrize("text", ["", "\n", "  \n"])
def test_empty_queue_has_no_rows(text: str) -> None:
    assert parse_queue(text) == []


@pytest.mark.parametrize("text", ["slurm_load_jobs error: Unexpected message received", "x" * 700, "7|oc-a|RUNNING"])
def test_text_that_is_no_queue_is_no_empty_queue(text: str) -> None:
    with pytest.raises(ValueError, match="squeue printed what is no row"):
        parse_queue(text)


def test_lines_between_rows_are_passed_over() -> None:
    good = line(JobArrayID="7", JobID="7", State="RUNNING", RestartCnt="0", Name="oc-a")
    assert len(parse_queue(f"squeue: warning: a plugin says hello\n{good}\n{good[:300]}\n")) == 1


def test_list_of_nodes_that_was_cut_is_not_used() -> None:
    long = "gpu[" + ",".join(str(number) for number in range(1, 200, 2)) + "]"
    assert only(NodeList=long).nodes == ()
    assert only(NodeList="gpu[1,3-4]").nodes == ("gpu1", "gpu3", "gpu4")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("RUNNING", "RUNNING"),
        ("CANCELLED by 0", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("NODE_FAIL*", "NODE_FAIL"),
        ("out_of_memory", "OUT_OF_MEMORY"),
        ("", ""),
    ],
)
def test_suffixes_of_states_are_removed(text: str, word: str) -> None:
    assert state_word(text) == word


def test_times_of_every_form_are_read() -> None:
    assert parse_time("1795449491") == 1795449491.0
    assert parse_time(time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1795449491))) == 1795449491.0
    for word in ("N/A", "NONE", "Unknown", "None", "", "0", "now"):
        assert parse_time(word) is None


def test_nodes_of_every_form_are_listed() -> None:
    assert node_list("gpu[01-03,7],login") == ("gpu01", "gpu02", "gpu03", "gpu7", "login")
    assert node_list("r[1-2]n[3-4]") == ("r1n3", "r1n4", "r2n3", "r2n4")
    for word in ("None assigned", "(null)", "", "N/A", "m[1-"):
        assert node_list(word) == ()


def test_accounting_in_a_strange_form_says_nothing() -> None:
    assert parse_accounting("12|12|RUNNING\nsacct: warning\n|||||\n12.batch|12.batch|FAILED|1|2|m1\n") == []

"""One rank of `benchmarks/engine.py`: the work that the first argument names, its result as JSON."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SKIPPED_STEPS = 5
Facts = dict[str, Any]


def main() -> None:
    """Do the work and leave."""
    work, values, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    facts = {"ours": run_ours, "bare": run_bare, "saves": run_saves, "restart": run_bare_restart}[work](values, steps)
    Path(os.environ["RESULT"]).write_text(json.dumps(facts))
    os._exit(0)


def built(values: dict[str, Any]) -> Any:
    """Join the ranks and build what both sides share: config, method, stream."""
    import torch

    from orchestrate.config.run import parse_run
    from orchestrate.data.index import dataset_identity
    from orchestrate.engine.methods import build_method
    from orchestrate.engine.ranks import join_ranks
    from ssl_methods.views import recipe

    identities = {split: dataset_identity(values["data"][split]) for split in ("train", "val")}
    values["data"] |= {f"{split}_digest": identity[0] for split, identity in identities.items()}
    config, problems = parse_run(values)
    assert config is not None, problems
    ranks = join_ranks()
    torch.set_num_threads(1)
    method = build_method(config).to(ranks.device)
    return config, ranks, method, recipe(config.views.name, config.views.size), identities["train"][1]


def run_ours(values: dict[str, Any], steps: int) -> Facts:
    """Train with the trainer; return the median seconds from the end of a step to the end of the next."""
    from orchestrate.engine.base import build_engine
    from orchestrate.engine.memory import peak_memory_gb
    from orchestrate.engine.startup import Startup
    from orchestrate.engine.trainer import Trainer
    from orchestrate.engine.watch import Heartbeat, StopWatch
    from orchestrate.runs import RunDir, create_run_dir

    config, ranks, method, recipe, num_samples = built(values)
    ends: list[float] = []

    class Timed(Trainer):
        def _step(self, *arguments: Any) -> Any:
            ends.append(time.perf_counter())
            return super()._step(*arguments)

    run = (
        create_run_dir(Path(os.environ["FOLDER"]) / "run", config.to_yaml())
        if ranks.is_main
        else RunDir(Path(os.environ["FOLDER"]) / "run")
    )
    heartbeat = Heartbeat(lambda facts: None)
    heartbeat.start()
    trainer = Timed(
        config,
        run,
        ranks=ranks,
        engine=build_engine(config, method, ranks),
        recipe=recipe,
        num_samples=num_samples,
        stop=StopWatch(run.stop_file),
        heartbeat=heartbeat,
        startup=Startup(),
        say=lambda text: None,
    )
    trainer._checkpoints.save = lambda *arguments, **options: None  # type: ignore[method-assign]  # measured elsewhere
    trainer.train()
    return {"step": median_gap(ends), "memory": peak_memory_gb(ranks.device)}


def run_bare(values: dict[str, Any], steps: int) -> Facts:
    """Train with a plain loop over DDP."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from orchestrate.engine.memory import peak_memory_gb
    from ssl_methods.views import normalise

    config, ranks, method, recipe, _ = built(values)
    model = DistributedDataParallel(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr, momentum=0.9)
    ends = []
    with batches(config, ranks, recipe) as stream:
        for _ in range(steps):
            ends.append(time.perf_counter())
            views = [normalise(view.to(ranks.device, non_blocking=True), recipe) for view in next(stream).views]
            loss = model(views).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
    return {"step": median_gap(ends), "memory": peak_memory_gb(ranks.device)}


@contextmanager
def batches(config: Any, ranks: Any, recipe: Any) -> Iterator[Any]:
    """Open the stream that the trainer opens."""
    from orchestrate.data.sample_source import Loading
    from orchestrate.data.stream import TrainStream

    stream = TrainStream(
        config.data.train,
        recipe=recipe,
        seed=0,
        global_batch=config.train.global_batch,
        start_step=0,
        rank=ranks.rank,
        world_size=ranks.world_size,
        loading=Loading.of(config.system),
    )
    try:
        yield stream
    finally:
        stream.close()


def median_gap(ends: list[float]) -> float:
    """Return the median time between two marks, the first steps left out."""
    return statistics.median(
        after - before for before, after in zip(ends[SKIPPED_STEPS:], ends[SKIPPED_STEPS + 1 :], strict=False)
    )


def run_saves(values: dict[str, Any], steps: int) -> Facts:
    """Time saves of ours and of torch.distributed.checkpoint, five each, after a first one."""
    import torch.distributed.checkpoint as dcp

    from orchestrate.engine.base import build_engine
    from orchestrate.engine.checkpoint import CheckpointStore, Position
    from ssl_methods.views import normalise

    config, ranks, method, recipe, _ = built(values)
    engine = build_engine(config, method, ranks)
    folder = Path(os.environ["FOLDER"])
    with batches(config, ranks, recipe) as stream:
        engine.update(engine.forward([normalise(view, recipe) for view in next(stream).views], None))
    state = {"model": method.state_dict(), "optimizer": dict(enumerate(engine.optimizer_state().values()))}
    size = sum(value.nbytes for value in method.state_dict().values()) + sum(
        v.nbytes for each in state["optimizer"].values() for v in each.values()
    )
    facts: Facts = {"megabytes": size / 1e6}

    def timed(save: Callable[[int], Any], finish: Callable[[Any], Any]) -> tuple[float, float]:
        stalls, totals = [], []
        for number in range(6):
            ranks.on_main(lambda: None)
            began = time.perf_counter()
            pending = save(number)
            stalls.append(time.perf_counter() - began)
            finish(pending)
            totals.append(time.perf_counter() - began)
        return statistics.median(stalls[1:]), statistics.median(totals[1:])

    for mode in ("sync", "async"):
        store = CheckpointStore(folder / mode, ranks, keep=2, asynchronous=mode == "async", say=lambda text: None)

        def ours(number: int, store: Any = store) -> None:
            store.save(engine, Position(number + 1, 0, "f" * 16, {}, {}))

        facts[f"ours {mode}"], facts["ours written"] = timed(ours, lambda _, store=store: store.finish())
    facts["peer sync"], _ = timed(
        lambda number: dcp.save(state, checkpoint_id=folder / f"dcp-{number}"), lambda _: None
    )
    peer_async = lambda number: dcp.async_save(state, checkpoint_id=folder / f"dcp-async-{number}")  # noqa: E731
    facts["peer async"], facts["peer written"] = timed(peer_async, lambda future: future.result())
    return facts


def run_bare_restart(values: dict[str, Any], steps: int) -> Facts:
    """Do what any restarted script must: import, join, build, load, take a step."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    config, ranks, method, recipe, _ = built(values)
    path = Path(os.environ["FOLDER"]) / f"state-{ranks.rank}.pt"
    began = time.time()
    torch.save(method.state_dict(), path)  # stands in for a checkpoint that was there; its time is taken off
    saving = time.time() - began
    method.load_state_dict(torch.load(path, weights_only=True))
    from ssl_methods.views import normalise

    model = DistributedDataParallel(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with batches(config, ranks, recipe) as stream:
        model([normalise(view, recipe) for view in next(stream).views]).loss.backward()
        optimizer.step()
    return {"total": time.time() - float(os.environ["STARTED"]) - saving}


if __name__ == "__main__":
    main()

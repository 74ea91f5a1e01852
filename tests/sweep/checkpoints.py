"""Checkpoints as the control plane sees them: manifests and files that hold no tensors."""

import hashlib
import json
from pathlib import Path

from orchestrate.checkpoint_files import FORMAT, MANIFEST, name_of, sealed
from tests.sweep.sweeps import NUM_SAMPLES


def write_checkpoint(run: Path, step: int, *, ranks: int = 2) -> Path:
    """Write a whole checkpoint of a step by so many ranks into a RunDir, and the metrics of the steps up to it."""
    path = run / "checkpoints" / name_of(step)
    path.mkdir(parents=True)
    data = f"weights of step {step}".encode()
    (path / "model.safetensors").write_bytes(data)
    files = {"model.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    facts = {"fingerprint": run.name, "order": {"num_samples": NUM_SAMPLES}, "milestone": False, "world_size": ranks}
    manifest = sealed({"format": FORMAT, "step": step, **facts, "files": files})
    (path / MANIFEST).write_text(json.dumps(manifest))
    lines = [json.dumps({"step": number, "loss": 1.0}) + "\n" for number in range(1, step + 1)]
    (run / "metrics.jsonl").write_text("".join(lines))
    return path


def steps_in(run: Path) -> list[int]:
    """Return the steps of metrics.jsonl."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]

"""Trials on a disk, and their encoders in other libraries."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrate.checkpoint_files import name_of
from orchestrate.config.run import parse_run
from orchestrate.engine.checkpoint import save_weights
from orchestrate.engine.checkpoint_publish import publish
from orchestrate.engine.export import Export, export_encoder, verify_loading
from orchestrate.engine.export_targets import Format, plan_loading
from orchestrate.engine.methods import build_method
from orchestrate.errors import CheckpointError, ConfigError, OrchestrateError, RunDirError
from orchestrate.runs import RunDir, create_run_dir, write_json
from ssl_methods.backbone import Backbone
from ssl_methods.backbones import build
from ssl_methods.method import Method

STEP = 120


def trained(module: Method, *, seed: int = 0) -> Method:
    """Give every tensor numbers of its own: a fresh network hides layers behind gains of zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith(("running_var", "norm.weight", "bn.weight")) or (value.ndim == 1 and "weight" in name):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.add_(0.02 * torch.randn(value.shape, generator=generator))
    return module


@dataclass(frozen=True)
class Trial:
    run: RunDir
    method: Method


def trial_of(
    runs: Path, backbone: str, *, size: int = 32, stem: str = "default", method: dict[str, Any] | None = None
) -> Trial:
    """Make the RunDir of a trial that has not begun, and the method as it is after training."""
    config, problems = parse_run(
        {
            "data": {"train": "unused", "val": "unused", "train_digest": "t", "val_digest": "v"},
            "method": method or {"name": "simclr", "embed_dim": 8, "hidden_dim": 16},
            "backbone": {"name": backbone, "stem": stem},
            "views": {"name": "small_grey", "size": size},
            "optim": {"name": "adamw", "lr": 0.001},
            "train": {"global_batch": 16, "budget": "1ep"},
        }
    )
    assert config is not None, problems
    run = create_run_dir(runs / config.fingerprint(), config.to_yaml())
    return Trial(run, trained(build_method(config)))


def finish(trial: Trial) -> RunDir:
    """Leave in the RunDir what a worker leaves at the end."""
    sha256 = save_weights(trial.method, trial.run.weights_file)
    write_json(trial.run.done_file, {"fingerprint": trial.run.path.name, "step": STEP, "weights_sha256": sha256})
    return trial.run


def checkpoint(trial: Trial, step: int, *, seed: int) -> None:
    """Leave in the RunDir a checkpoint of weights that follow from the seed."""
    weights = trained(trial.method, seed=seed).state_dict()
    facts = {"step": step, "samples_seen": 0, "fingerprint": trial.run.path.name, "world_size": 1, "milestone": False}
    publish(trial.run.checkpoints, {"model.safetensors": weights}, facts)


def images_of(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features_of(encoder: Backbone, size: int) -> Tensor:
    return encoder.eval()(images_of(size))


CASES: list[tuple[str, str, int, Format]] = [
    ("resnet18", "default", 64, "torchvision"),
    ("resnet18", "small", 32, "torchvision"),
    ("resnet50", "default", 64, "torchvision"),
    ("convnext_tiny", "default", 64, "torchvision"),
    ("swin_t", "default", 64, "torchvision"),
    ("squeezenet1_1", "default", 64, "torchvision"),
    ("googlenet", "default", 64, "torchvision"),
    ("resnet18", "default", 64, "timm"),
    ("resnet18", "small", 32, "timm"),
    ("vit_tiny_patch16_224", "default", 224, "timm"),
    ("test_resnet", "default", 64, "timm"),
    ("tiny_resnet", "default", 28, "safetensors"),
    ("resnet18", "small", 32, "safetensors"),
]
# As a user would: no package of ours, the line that the record states, in the folder of the file.
STRANGER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
features = {}
for file in sorted(Path().glob("*.safetensors.json"), key=lambda file: file.name.startswith("safetensors")):
    record = json.loads(file.read_text())
    if record["format"] == "safetensors" and "ours" not in features:
        features["ours"] = torch.tensor(float(any(name in sys.modules for name in ("orchestrate", "ssl_methods"))))
    variables = {}
    exec(record["recipe"], variables)
    size = record["images"]["size"]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features[record["file"]] = variables["model"](images).contiguous()
save_file(features, "features")
"""


@dataclass(frozen=True)
class Exported:
    export: Export
    here: Tensor
    there: Tensor
    network: dict[str, Tensor]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str, int, Format], Exported]]:
    """Every case, exported here and loaded by a stranger, all in one process as imports take seconds."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for case in CASES:
        name, stem, size, form = case
        trial = trial_of(folder / "runs", name, size=size, stem=stem)
        export = export_encoder(finish(trial), folder / f"{form}-{name}-{stem}.safetensors", form=form)
        made[case] = (export, features_of(trial.method.encoder(), size))
        shutil.rmtree(trial.run.path)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    stranger = [sys.executable, "-c", STRANGER]
    result = subprocess.run(stranger, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    there = load_file(folder / "features")
    assert there["ours"] == 0, "a recipe of another library imported a package of ours"
    yield {
        case: Exported(export, here, there[export.file], load_file(folder / export.file))
        for case, (export, here) in made.items()
    }
    shutil.rmtree(folder)  # half a gigabyte


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stranger_gets_the_same_features_from_the_recipe(case: Any, exported: dict[Any, Exported]) -> None:
    done = exported[case]
    assert done.here.shape[1] == done.export.embed_dim
    assert done.here.abs().max() > 0.01
    # fp32 sums in another order, as the libraries may use; and what the export itself allows
    assert (done.here - done.there).abs().max() <= 1e-5 * done.here.abs().max()
    assert done.export.max_relative_difference <= 1e-5


def test_report_counts_the_classifier_as_missing_and_nothing_else(exported: dict[Any, Exported]) -> None:
    for (name, _, _, form), done in exported.items():
        report = done.export.report
        assert (report.matched, report.unexpected) == (len(done.network), ())
        assert bool(report.missing) == (form == "torchvision"), name
    resnet = exported["resnet18", "default", 64, "torchvision"].export
    assert resnet.report.missing == ("fc.weight", "fc.bias")
    assert "model.fc = torch.nn.Identity()" in resnet.recipe
    assert "missing (the classifier: fc.weight, fc.bias)" in resnet.text()
    convnext = exported["convnext_tiny", "default", 64, "torchvision"].export
    assert "model.classifier[2] = torch.nn.Identity()" in convnext.recipe


def test_names_are_the_library_s_own(exported: dict[Any, Exported]) -> None:
    assert "layer1.0.conv1.weight" in exported["resnet18", "default", 64, "torchvision"].network
    assert "blocks.0.attn.qkv.weight" in exported["vit_tiny_patch16_224", "default", 224, "timm"].network
    assert "stem.0.weight" in exported["tiny_resnet", "default", 28, "safetensors"].network


def test_record_says_where_the_weights_come_from_and_how_images_are_prepared(tmp_path: Path) -> None:
    run = finish(trial_of(tmp_path, "tiny_resnet", size=28))
    export = export_encoder(run, tmp_path / "deep" / "er" / "encoder.safetensors", form="safetensors")
    record = json.loads((tmp_path / "deep" / "er" / "encoder.safetensors.json").read_text())
    assert record["trial"] == record["fingerprint"] == run.path.name
    assert (record["step"], record["weights"]) == (STEP, "results/weights.safetensors")
    assert (record["method"], record["backbone"], record["embed_dim"]) == ("simclr", "tiny_resnet", 128)
    assert record["images"]["size"] == 28
    assert len(record["images"]["mean"]) == len(record["images"]["std"]) == 3
    assert record["recipe"] == export.recipe
    assert "'encoder.safetensors'" in record["recipe"]  # to be run beside the file, wherever it goes


def test_teacher_is_exported_where_the_method_evaluates_it(tmp_path: Path) -> None:
    trial = trial_of(
        tmp_path, "tiny_resnet", method={"name": "dino", "embed_dim": 8, "hidden_dim": 16, "output_dim": 9}
    )
    assert trial.method.encoder() is not trial.method.backbone
    finish(trial)
    export(trial, tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], value) for name, value in trial.method.encoder().state_dict().items())
    assert not torch.equal(found["stem.0.weight"], trial.method.backbone.state_dict()["stem.0.weight"])


@pytest.mark.parametrize(
    ("name", "form", "told"),
    [
        ("tiny_resnet", "torchvision", "tiny_resnet is no network of torchvision; use --format safetensors"),
        ("tiny_resnet", "timm", "tiny_resnet is no network of timm; use --format safetensors"),
        ("test_resnet", "torchvision", "is no network of torchvision; use --format timm or safetensors"),
        ("convnext_tiny", "timm", r"\d+ missing here \(stem.0.weight.*; use --format torchvision or safetensors"),
    ],
)
def test_wrong_format_is_answered_with_those_that_fit(name: str, form: Format, told: str, tmp_path: Path) -> None:
    run = finish(trial_of(tmp_path / "runs", name))
    with pytest.raises(ConfigError, match=told):
        export_encoder(run, tmp_path / "encoder.safetensors", form=form)
    assert not list(tmp_path.glob("*encoder*"))


def test_library_that_computes_something_else_from_the_weights_is_found_out(tmp_path: Path) -> None:
    encoder = trial_of(tmp_path, "resnet18").method.encoder()
    assert isinstance(encoder, build.Headless)
    encoder.network.relu = nn.GELU()  # no weights, so every name and shape fits
    loading = plan_loading(encoder, "torchvision", name="resnet18", stem="default")
    save_weights(encoder.network, tmp_path / "file")
    with pytest.raises(ConfigError, match="features there differ: max abs difference"):
        verify_loading(encoder, loading, tmp_path / "file", size=32)


def test_library_that_does_not_take_the_weights_is_one_message(tmp_path: Path) -> None:
    encoder = build.build("mnasnet0_5")  # refuses state without the version that only pickled state has
    loading = plan_loading(encoder, "torchvision", name="mnasnet0_5", stem="default")
    save_weights(encoder, tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be loaded there: version should be"):
        verify_loading(encoder, loading, tmp_path / "file", size=32)


def test_weights_that_are_no_numbers_are_not_exported(tmp_path: Path) -> None:
    trial = trial_of(tmp_path / "runs", "tiny_resnet")
    next(trial.method.encoder().parameters()).data[0] = torch.nan
    with pytest.raises(ConfigError, match="max abs difference nan"):
        export_encoder(finish(trial), tmp_path / "file", form="safetensors")
    assert not list(tmp_path.glob("*file*"))


def export(trial: Trial, out: Path, *, at: str = "") -> Export:
    return export_encoder(trial.run, out, form="safetensors", checkpoint=at)


def test_trial_that_is_not_done_says_what_there_is(tmp_path: Path) -> None:
    trial = trial_of(tmp_path, "tiny_resnet")
    with pytest.raises(RunDirError, match="is not done, so it has no final weights; there is no checkpoint"):
        export(trial, tmp_path / "file")
    checkpoint(trial, 40, seed=1)
    checkpoint(trial, 80, seed=2)
    with pytest.raises(RunDirError, match="checkpoints of step 80, 40: export one with --checkpoint STEP, or newest"):
        export(trial, tmp_path / "file")


def test_checkpoints_are_exported_by_step_or_the_newest_whole_one(tmp_path: Path) -> None:
    trial = trial_of(tmp_path, "tiny_resnet")
    expected = {}
    for step in (40, 80, 120):
        checkpoint(trial, step, seed=step)
        expected[step] = {name: value.clone() for name, value in trial.method.encoder().state_dict().items()}
    broken = trial.run.checkpoints / name_of(120) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    for at, step in (("newest", 80), ("40", 40)):
        found = export(trial, tmp_path / at, at=at)
        assert (found.step, found.weights) == (step, f"checkpoints/{name_of(step)}/model.safetensors")
        assert ("skipped, as it is damaged: step-00000120: model" in found.text()) == (at == "newest")
        weights = load_file(tmp_path / at)
        assert all(torch.equal(weights[name], value) for name, value in expected[step].items())
    with pytest.raises(CheckpointError, match=r"--checkpoint 120: no whole one; (.|\n)*step-00000120: .*bytes"):
        export(trial, tmp_path / "file", at="120")
    with pytest.raises(CheckpointError, match="--checkpoint 41: no whole one; there are checkpoints of step 120, 80"):
        export(trial, tmp_path / "file", at="41")
    with pytest.raises(ConfigError, match="--checkpoint best: write a step, or newest"):
        export(trial, tmp_path / "file", at="best")


def test_final_weights_that_changed_since_the_trial_was_done_are_refused(tmp_path: Path) -> None:
    trial = trial_of(tmp_path, "tiny_resnet")
    path = finish(trial).weights_file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="fails its SHA-256"):
        export(trial, tmp_path / "file")
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        export(trial, tmp_path / "file")


def test_same_export_again_leaves_the_file_and_another_is_refused(tmp_path: Path) -> None:
    trial = trial_of(tmp_path / "runs", "tiny_resnet")
    finish(trial)
    out, record = tmp_path / "file", tmp_path / "file.json"
    export(trial, out)
    before = (out.stat().st_ino, record.read_text())
    record.unlink()  # as if killed between the two
    export(trial, out)
    assert (out.stat().st_ino, record.read_text()) == before
    checkpoint(trial, 40, seed=7)
    with pytest.raises(RunDirError, match="exists and has other bytes; choose another --out, or remove it"):
        export(trial, out, at="40")
    assert (out.stat().st_ino, record.read_text()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.json", "runs"]


@pytest.mark.parametrize("content", ["notes", '{"name": "mine"}', "[]"])
def test_foreign_file_in_the_record_s_place_is_refused_before_anything_is_written(content: str, tmp_path: Path) -> None:
    trial = trial_of(tmp_path / "runs", "tiny_resnet")
    finish(trial)
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(RunDirError, match=r"file\.json: exists and is no record of an export"):
        export(trial, tmp_path / "file")
    assert (tmp_path / "file.json").read_text() == content
    assert not (tmp_path / "file").exists()


def test_folder_in_the_file_s_place_is_refused(tmp_path: Path) -> None:
    trial = trial_of(tmp_path / "runs", "tiny_resnet")
    finish(trial)
    (tmp_path / "file").mkdir()
    with pytest.raises(OrchestrateError, match="is a folder; write a file name with --out"):
        export(trial, tmp_path / "file")


def test_export_leaves_the_random_numbers_of_its_caller_alone(tmp_path: Path) -> None:
    trial = trial_of(tmp_path / "runs", "tiny_resnet")
    finish(trial)
    before = torch.get_rng_state()
    export(trial, tmp_path / "file")
    assert torch.equal(torch.get_rng_state(), before)


def test_window_of_attention_is_part_of_the_recipe() -> None:
    encoder = build.build("tiny_swin", window=4)
    loading = plan_loading(encoder, "safetensors", name="tiny_swin", stem="default", window=4)
    assert "model = build('tiny_swin', window=4)" in loading.recipe("file")
    with torch.device("meta"):  # names and shapes alone
        encoder = build.build("swin_tiny_patch4_window7_224", window=14)
    loading = plan_loading(
        encoder.to_empty(device="cpu"), "timm", name="swin_tiny_patch4_window7_224", stem="default", window=14
    )
    assert "timm.create_model('swin_tiny_patch4_window7_224', num_classes=0, window_size=14)" in loading.recipe("file")

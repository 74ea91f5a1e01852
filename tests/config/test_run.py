import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrate.config.load import parse_document
from orchestrate.config.run import RunConfig, load_run, parse_run, run_of
from orchestrate.errors import ConfigError

VALUES: dict[str, Any] = {
    "data": {"train": "data/train", "val": "data/val", "train_digest": "t" * 64, "val_digest": "v" * 64},
    "method": {"name": "barlow_twins", "embed_dim": 64},
    "backbone": {"name": "tiny_resnet"},
    "views": {"name": "small_grey", "size": 28},
    "optim": {"name": "lars", "lr": 0.2, "bias_lr": 0.0048},
    "train": {"global_batch": 128, "budget": "2ep", "warmup": "10%"},
    "probes": [{"name": "knn"}],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    *parents, last = path.split(".")
    at = values
    for part in parents:
        at = at.setdefault(part, {})
    at[last] = value
    return values


def steps(*milestones: str) -> dict[str, Any]:
    return {"name": "step", "milestones": list(milestones)}


def resolved(values: dict[str, Any]) -> RunConfig:
    config, problems = parse_run(values)
    assert config is not None, problems
    return config


def message_of(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        run_of(parse_document(yaml.safe_dump(values, sort_keys=False), Path("run.yaml")))
    return str(caught.value)


def test_resolved_config_states_every_default() -> None:
    config = resolved(VALUES)
    assert config.method.params["off_diagonal"] == 0.0051
    assert config.probes[0].params == {"k": 20, "temperature": 0.07}
    assert config.system.engine == "deepspeed"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.seed", 0),
        ("train.schedule", {"name": "step", "milestones": ["60%", "80%"], "factor": 0.1}),
        ("train.schedule", {"name": "wsd", "decay": "10%"}),
        ("system", {"milestones": ["1ep", "50%"], "micro_batch": 8, "hang_minutes": 5}),
        ("optim.final_weight_decay", 1),
    ],
)
def test_resolved_config_reads_back_equal(tmp_path: Path, path: str, value: Any) -> None:
    config = resolved(changed(path, value))
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert load_run(tmp_path / "run.yaml") == config


def test_views_default_to_the_methods_own() -> None:
    assert resolved(changed("views", {"size": 28})).views.name == "barlow_twins"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.seed", 1),
        ("train.budget", "3ep"),
        ("method.embed_dim", 128),
        ("method.off_diagonal", 0.01),
        ("optim.lr", 0.3),
        ("data.train_digest", "u" * 64),
        ("probes", [{"name": "knn", "k": 5}]),
        ("views.size", 32),
        ("train.schedule", {"name": "constant"}),
        ("train.schedule", {"name": "cosine", "final_fraction": 0}),
        ("train.precision", "fp16"),
        ("optim.variant", "triplet"),
        ("optim.final_weight_decay", 0.4),
        ("optim.clip", "global"),
        ("continues", {"trial": "0" * 16, "step": 3}),
    ],
)
def test_fingerprint_covers_what_changes_the_numbers(path: str, value: Any) -> None:
    assert resolved(changed(path, value)).fingerprint() != resolved(VALUES).fingerprint()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("system", {"workers": 4, "checkpoint_every": "5step", "engine": "ddp", "micro_batch": 8}),
        ("system", {"milestones": ["1ep", "50%"], "checkpoint_url": "memory://a", "compile": True}),
        ("train.schedule", {"name": "cosine", "final_fraction": 0.001}),
        ("optim.final_weight_decay", "same"),
        ("data.train", "s3://elsewhere/train"),
        ("method.off_diagonal", 0.0051),
        ("train.budget", "2.0ep"),
        ("data.train_samples", 1281167),
        ("system.images_per_second", 400),
    ],
)
def test_fingerprint_ignores_what_does_not(path: str, value: Any) -> None:
    assert resolved(changed(path, value)).fingerprint() == resolved(VALUES).fingerprint()


def test_fingerprint_is_stable_over_versions_of_this_code() -> None:
    # A change here means that every RunDir ever made is orphaned: raise FORMAT and say so in the changelog.
    assert resolved(VALUES).fingerprint() == "da56aa3021bfce49"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("method.embed_dims", 64, "run.yaml:9: method.embed_dims: unknown key; did you mean `embed_dim`?"),
        ("methd", {}, "methd: {}: unknown section; did you mean `method`?"),
        ("method.name", "barlow", "run.yaml:7: method.name: 'barlow': no such plug-in; did you mean `barlow_twins`?"),
        (
            "method",
            "barlow_twins",
            "run.yaml:6: method: 'barlow_twins': must be a mapping; write `{name: barlow_twins}`",
        ),
        (
            "method",
            "barlow_twin",
            "method: 'barlow_twin': must be a mapping, and there is no such plug-in; did you mean `barlow_twins`?",
        ),
        ("method", 3, "method: 3: must be a mapping; write `{name: ...}`, one of barlow_twins"),
        ("method.loss_scale", math.inf, "method.loss_scale: inf: must be a finite number"),
        ("optim", "lars", "optim: 'lars': must be a mapping; write `{name: lars}`"),
        ("optim.name", ["lars"], "optim.name: ['lars']: no such optimizer"),
        ("optim.lr", math.inf, "optim.lr: inf: must be a finite number"),
        ("optim.weight_decay", math.nan, "optim.weight_decay: nan: must be"),
        ("optim.lr", 10**400, "optim.lr: 1000"),
        ("backbone", "tiny_resnet", "backbone: 'tiny_resnet': must be a mapping of keys; write `{name: tiny_resnet}`"),
        ("train", 3, "train: 3: must be a mapping of keys, such as `{global_batch: ...}`"),
        ("train.global_batch", 2**24 + 1, "train.global_batch: 16777217: must be less than or equal to 16777216"),
        ("data.train", "", "data.train: '': must not be empty"),
        ("probes", ["knn"], "probes.0: 'knn': must be a mapping; write `{name: knn}`"),
        ("method.embed_dim", 0, "run.yaml:8: method.embed_dim: 0: must be greater than 0"),
        ("method.embed_dim", "64", "method.embed_dim: '64': must be a valid integer"),
        ("backbone.name", "resnet5", "backbone.name: 'resnet5': no such backbone; did you mean"),
        ("views.name", "small_gray", "views.name: 'small_gray': no such recipe; did you mean `small_grey`?"),
        ("views.name", "supervised", "views.name: 'supervised': makes 1 views, barlow_twins takes 2; write one of"),
        ("optim.name", "larz", "optim.name: 'larz': no such optimizer; did you mean `lars`?"),
        ("optim.betas", 1, "optim.betas: unknown key; known: lr, weight_decay, final_weight_decay, lr_scaling, clip"),
        ("optim.clip", "norm", "optim.clip: 'norm': must be 'none', 'global' or 'per_tensor'"),
        ("optim.clip_norm", 3.0, "optim.clip_norm: 3.0: means nothing without clipping; add `clip: global`"),
        ("optim.final_weight_decay", -1, "optim.final_weight_decay: -1: must be a number of at least 0, or `same`"),
        ("optim.final_weight_decay", True, "optim.final_weight_decay: True: must be a number of at least 0"),
        ("optim.freeze_last_layer", "1ep", "freeze_last_layer: '1ep': barlow_twins has no last layer that could be"),
        ("optim.freeze_last_layer", "2ep", "freeze_last_layer: '2ep': as long as the budget of 2ep"),
        ("optim.decay_vectors", True, "optim.decay_vectors: unknown key"),
        ("optim.variant", "triple", "optim.variant: 'triple': must be 'barlow_twins' or 'triplet'"),
        ("train.budget", "20", "train.budget: '20': not an amount with a unit; write 20ep"),
        ("train.budget", "8gpuh", "train.budget: '8gpuh': a schedule needs a length in ep, img or step"),
        ("train.warmup", "2ep", "train.warmup: '2ep': as long as the budget of 2ep"),
        ("train.warmup", "100%", "train.warmup: '100%': as long as the budget of 2ep"),
        ("train.warmup", "1gpuh", "train.warmup: '1gpuh': write ep, img, step or a part such as 10%"),
        ("train.precision", "fp8", "train.precision: 'fp8': must be 'fp32', 'bf16' or 'fp16'"),
        ("train.schedule", "cosine", "train.schedule: 'cosine': must be a mapping; write `{name: cosine}`"),
        ("train.schedule", {"final_fraction": 0}, "train.schedule.name: missing; one of cosine, linear, step, wsd"),
        ("train.schedule", {"name": "cosin"}, "schedule.name: 'cosin': no such schedule; did you mean `cosine`?"),
        ("train.schedule", {"name": "linear", "factor": 1}, "train.schedule.factor: unknown key; known: name, final"),
        ("train.schedule", {"name": "cosine", "final_fraction": 2}, "final_fraction: 2: must be less than or equal"),
        ("train.schedule", {"name": "step"}, "train.schedule.milestones: missing; add `milestones: ...`"),
        ("train.schedule", steps(), "train.schedule.milestones: []: must not be empty"),
        ("train.schedule", steps("80%", "60%"), "milestones: '80%, 60%': must ascend; sort them"),
        ("train.schedule", steps("60%", "60%"), "milestones: '60%, 60%': must ascend; sort them"),
        ("train.schedule", steps("60%", "1ep"), "milestones: '60%, 1ep': have several units; write all in one"),
        ("train.schedule", steps("1ep", "2ep"), "milestones.1: '2ep': is not before the end of the budget of 2ep"),
        ("train.schedule", steps("60"), "milestones.0: '60': not an amount with a unit"),
        ("train.schedule", {"name": "step", "milestones": "60%"}, "'60%': must be a list; write `[a, b]`"),
        ("train.schedule", {"name": "wsd", "decay": "95%"}, "decay: '95%': is, with a warm-up of 10%, longer than"),
        ("train.schedule", {"name": "wsd", "decay": "0%"}, "decay: '0%': must be more than 0"),
        ("train.stages", {"starts": ["60%", "40%"]}, "train.stages.starts: '60%, 40%': must ascend; sort them"),
        ("train.stages", {"starts": ["1ep", "50%"]}, "train.stages.starts: '1ep, 50%': have several units"),
        ("train.stages", {"starts": ["2ep"]}, "train.stages.starts.0: '2ep': is not before the end of the budget"),
        ("train.stages", {"starts": ["0ep"]}, "train.stages.starts.0: '0ep': must be more than 0"),
        ("train.stages", {"optimizer": "reset"}, "stages.optimizer: 'reset': means nothing without a second stage"),
        ("train.stages", {"schedule": "restart"}, "stages.schedule: 'restart': means nothing without a second stage"),
        ("train.stages", {"start": ["1ep"]}, "train.stages.start: unknown key; did you mean `starts`?"),
        ("data.train_samples", -1, "data.train_samples: -1: must be greater than or equal to 0"),
        ("continues", {"trial": "x", "step": 1}, "continues.trial: 'x': must be the 16 hex digits of a trial"),
        ("continues", {"trial": "0" * 16}, "continues.step: 0: which step of 0000000000000000?"),
        ("continues", {"step": 3}, "continues.trial: '': whose step 3?"),
        ("system", {"engine": "ddp", "zero_stage": 2}, "system.zero_stage: 2: plain DDP has no ZeRO; write"),
        ("system", {"zero_stage": 4}, "system.zero_stage: 4: must be 0, 1, 2 or 3"),
        ("system", {"micro_batch": 0}, "system.micro_batch: 0: must be a number of images above 0, or `all`"),
        ("system", {"milestones": ["1gpuh"]}, "system.milestones.0: '1gpuh': write ep, img, step or a part"),
        ("system", {"checkpoint_url": "bucket/runs"}, "checkpoint_url: 'bucket/runs': must be a URL such as s3://"),
        ("system", {"hang_minutes": 0}, "system.hang_minutes: 0: must be greater than 0"),
        ("probes", [{"name": "knm"}], "probes.0.name: 'knm': no such plug-in; did you mean `knn`?"),
        ("probes", [{"name": "knn"}, {"name": "knn"}], "the same probe is listed before"),
    ],
)
def test_bad_value_is_named_with_line_key_value_and_fix(path: str, value: Any, message: str) -> None:
    assert message in message_of(changed(path, value))


def test_twin_under_zero_3_is_refused_with_its_reason() -> None:
    values = changed("method", {"name": "moco"}) | {"system": {"zero_stage": 3}}
    assert "system.zero_stage: 3: the twin of moco averages whole parameters, ZeRO 3 leaves" in message_of(values)


def test_last_layer_that_a_method_has_can_be_frozen() -> None:
    values = changed("method", {"name": "dino"}) | {"views": {"name": "small_grey", "size": 28}}
    values["optim"] = {"name": "adamw", "lr": 0.1, "freeze_last_layer": "1ep"}
    assert str(resolved(values).optim.freeze_last_layer) == "1ep"


def test_missing_parts_are_named() -> None:
    values = copy.deepcopy(VALUES)
    del values["backbone"], values["train"]["global_batch"], values["optim"], values["method"]
    text = message_of(values)
    assert "method: missing section; it needs `name`, one of barlow_twins" in text
    assert "optim: missing section; it needs `name`, one of lars, sgd, adamw" in text
    assert "backbone: missing section; it needs `name`" in text
    assert "train.global_batch: missing; add `global_batch: ...` to train" in text


def test_all_problems_are_told_at_once() -> None:
    values = changed("method.embed_dims", 64) | {"optim": {"name": "lars", "lr": -1}, "train": {"budget": 3}}
    assert len(message_of(values).splitlines()) == 5

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.backbones import build
from ssl_methods.heads import build_mlp
from ssl_methods.methods.moco import MoCo
from ssl_methods.pretrained import load_encoder, read_weights

LIBRARY = "shufflenet_v2_x0_5"  # torchvision's smallest with a classifier called fc


def encoder_of(name: str = "tiny_resnet", *, seed: int = 1) -> tuple[Backbone, nn.Sequential]:
    torch.manual_seed(seed)
    backbone = build.build(name)
    return backbone, build_mlp([backbone.embed_dim, 12, 8], activation=nn.ReLU)


def state_of(*parts: nn.Module) -> list[Tensor]:
    return [value.clone() for part in parts for value in part.state_dict().values()]


def assert_equal(*parts: nn.Module, expected: list[Tensor]) -> None:
    for found, wanted in zip(state_of(*parts), expected, strict=True):
        assert torch.equal(found, wanted)


def whole_method() -> tuple[dict[str, Tensor], list[Tensor]]:
    """The weights of a MoCo of ours, and those of its encoder in order."""
    torch.manual_seed(0)
    method = MoCo(build.build("tiny_resnet"), embed_dim=8, hidden_dim=12, queue_size=16)
    for value in method.state_dict().values():
        value.copy_(torch.rand(value.shape))
    return method.state_dict(), state_of(method.backbone, method.projector)


def moco_file() -> tuple[dict[str, Any], list[Tensor]]:
    """What the authors' MoCo saves of a network whose fc is a head of two layers."""
    backbone, projector = encoder_of(LIBRARY, seed=0)
    network = {name.removeprefix("network."): value for name, value in backbone.state_dict().items()}
    head = {f"fc.{name}": value for name, value in projector.state_dict().items()}
    query = {f"module.encoder_q.{name}": value for name, value in (network | head).items()}
    twin = {name.replace("encoder_q", "encoder_k"): torch.zeros_like(value) for name, value in query.items()}
    queue = {"module.queue": torch.rand(8, 16), "module.queue_ptr": torch.zeros(1)}
    content = {"epoch": 3, "state_dict": query | twin | queue, "args": argparse.Namespace(lr=0.03)}
    return content, state_of(backbone, projector)


def test_weights_of_a_whole_method_fill_backbone_and_projector(tmp_path: Path) -> None:
    state, expected = whole_method()
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    backbone, projector = encoder_of()
    report = load_encoder(str(file), backbone, projector)
    assert_equal(backbone, projector, expected=expected)
    assert report.num_matched == len(expected)
    assert report.num_left == len(state) - len(expected)  # twin and queue
    assert report.text().startswith(f"{file}: a whole method: {len(expected)} matched, 0 missing, 0 unexpected, ")


def test_projector_of_the_file_is_left_out_where_there_is_none(tmp_path: Path) -> None:
    state, expected = whole_method()
    save_file(state, tmp_path / "weights.safetensors")
    backbone, _ = encoder_of()
    report = load_encoder(str(tmp_path / "weights.safetensors"), backbone, nn.Identity())
    assert report.num_matched == len(state_of(backbone))
    assert_equal(backbone, expected=expected[:-4])


@pytest.mark.parametrize("zipped", [True, False])  # torch's format since 1.6, and that of older files
def test_mocos_query_encoder_is_taken_and_its_queue_is_not(tmp_path: Path, zipped: bool) -> None:
    content, expected = moco_file()
    torch.save(content, tmp_path / "checkpoint.pth.tar", _use_new_zipfile_serialization=zipped)
    backbone, projector = encoder_of(LIBRARY)
    report = load_encoder(str(tmp_path / "checkpoint.pth.tar"), backbone, projector)
    assert_equal(backbone, projector, expected=expected)
    assert (report.layout, report.num_left) == ("MoCo's query encoder", len(expected) + 2)


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_a_library_load_without_their_classifier_and_old_ones_without_counters(
    tmp_path: Path, wrapped: bool
) -> None:
    source, _ = encoder_of(LIBRARY, seed=0)
    names = {name.removeprefix("network."): value for name, value in source.state_dict().items()}
    old = {name: value for name, value in names.items() if not name.endswith("num_batches_tracked")}
    state = old | {"fc.weight": torch.rand(1000, source.embed_dim), "fc.bias": torch.rand(1000)}
    torch.save({"model": state} if wrapped else state, tmp_path / "weights.pth")
    backbone, _ = encoder_of(LIBRARY)
    report = load_encoder(str(tmp_path / "weights.pth"), backbone, nn.Identity())
    assert_equal(backbone, expected=state_of(source))
    assert (report.num_matched, report.num_left) == (len(old), 2)


@pytest.mark.parametrize("name", ["tiny_resnet", LIBRARY])
def test_exported_encoder_is_loaded_by_our_own_names(tmp_path: Path, name: str) -> None:
    source, _ = encoder_of(name, seed=0)
    save_file(source.state_dict(), tmp_path / "encoder.safetensors")
    backbone, _ = encoder_of(name)
    assert load_encoder(str(tmp_path / "encoder.safetensors"), backbone, nn.Identity()).num_left == 0
    assert_equal(backbone, expected=state_of(source))


def test_file_without_a_head_is_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    source, _ = encoder_of(LIBRARY, seed=0)
    state = {name.removeprefix("network."): value for name, value in source.state_dict().items()}
    torch.save(state | {"fc.weight": torch.rand(1000, source.embed_dim)}, tmp_path / "weights.pth")
    backbone, projector = encoder_of(LIBRARY)
    before = state_of(backbone, projector)
    with pytest.raises(ValueError, match=r"4 missing \(projector.0.weight, projector.0.bias, .*; 0 unexpected"):
        load_encoder(str(tmp_path / "weights.pth"), backbone, projector)
    assert_equal(backbone, projector, expected=before)


def test_layers_that_only_the_files_network_has_are_refused(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"  # whose blocks hold identities where others of its kind have norms or scales
    source = timm.create_model(name, num_classes=10, init_values=1e-5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"0 missing; 24 unexpected \(blocks.0.ls1.gamma, .*; 0 of another shape"):
        load_encoder(str(tmp_path / "weights.pth"), build.build(name), nn.Identity())
    plain = {name: value for name, value in source.state_dict().items() if not name.endswith("gamma")}
    torch.save(plain, tmp_path / "weights.pth")
    assert load_encoder(str(tmp_path / "weights.pth"), build.build(name), nn.Identity()).num_left == 2  # the classifier


def test_stores_errors_of_any_kind_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise LookupError("no credentials")

    monkeypatch.setattr(fsspec, "open", refuse)
    with pytest.raises(ValueError, match=r"^s3://bucket/weights.pth: cannot be read: no credentials$"):
        read_weights("s3://bucket/weights.pth")


def test_names_and_shapes_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state, _ = whole_method()
    state["backbone.stem.0.weight"] = torch.rand(24, 3, 5, 5)
    state["backbone.extra.weight"] = torch.rand(3)
    state["projector.5.bias"] = torch.rand(3)
    del state["backbone.stem.1.bias"]
    save_file(state, tmp_path / "weights.safetensors")
    backbone, projector = encoder_of()
    before = state_of(backbone, projector)
    with pytest.raises(ValueError) as caught:
        load_encoder(str(tmp_path / "weights.safetensors"), backbone, projector)
    text = str(caught.value)
    assert "1 missing (backbone.stem.1.bias)" in text
    assert "2 unexpected (backbone.extra.weight, projector.5.bias)" in text
    assert "1 of another shape (backbone.stem.0.weight: (24, 3, 5, 5) for (24, 3, 3, 3))" in text
    assert text.endswith("backbone, hidden_dim and embed_dim must be those that the file was trained with")
    assert_equal(backbone, projector, expected=before)


def test_a_single_name_too_many_is_refused(tmp_path: Path) -> None:
    save_file(whole_method()[0] | {"projector.4.weight": torch.rand(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"0 missing; 1 unexpected \(projector.4.weight\); 0 of another shape; "):
        load_encoder(str(tmp_path / "weights.safetensors"), *encoder_of())


def test_weights_of_a_training_that_diverged_are_refused(tmp_path: Path) -> None:
    tensors, _ = whole_method()
    tensors["projector.0.bias"][3] = torch.nan
    torch.save(tensors, tmp_path / "method.pth")
    parts = encoder_of()
    before = state_of(*parts)
    with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinity \(projector\.0\.bias\)"):
        load_encoder(str(tmp_path / "method.pth"), *parts)
    assert_equal(*parts, expected=before)


def test_long_lists_are_shortened(tmp_path: Path) -> None:
    save_file({"backbone.other": torch.rand(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"missing \((?:[^,]+, ){6}and \d+ more\)"):
        load_encoder(str(tmp_path / "weights.safetensors"), *encoder_of())


def test_url_is_read_and_hashed() -> None:
    state, expected = whole_method()
    with fsspec.open("memory://weights.pth", "wb") as file:
        torch.save(state, file)
    data = fsspec.filesystem("memory").cat("/weights.pth")
    sha256 = hashlib.sha256(data).hexdigest()
    backbone, projector = encoder_of()
    load_encoder("memory://weights.pth", backbone, projector, sha256=sha256.upper())
    assert_equal(backbone, projector, expected=expected)
    with pytest.raises(ValueError, match=f"memory://weights.pth: SHA-256 is {sha256}, expected {64 * 'a'}"):
        load_encoder("memory://weights.pth", backbone, projector, sha256=64 * "a")


class Armed:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("a pickle ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": Armed()}, "is no file of weights"),
        ([torch.ones(2)], "is no file of weights: holds a list, not tensors by name"),
        ({"epoch": 3}, "holds no tensors, but epoch"),
        ({}, "holds no tensors, but nothing"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        read_weights(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    "data", [b"", b"version https://git-lfs.github.com/spec/v1", 8 * b"\xff" + b"{", b"PK", b"\x80\x02.", b"\x80\x02J"]
)
def test_damaged_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "weights").write_bytes(data)
    with pytest.raises(ValueError, match="weights: is no file of weights: "):
        read_weights(str(tmp_path / "weights"))


@pytest.mark.parametrize("source", ["nowhere/weights.pth", "unknown://weights.pth", ""])
def test_missing_file_is_refused(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{source}: cannot be read: "):
        read_weights(source)


def test_report_counts_nothing_twice(tmp_path: Path) -> None:
    state: Mapping[str, Tensor] = whole_method()[0]
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "weights.safetensors")
    assert read_weights(str(tmp_path / "weights.safetensors")).keys() == state.keys()

"""Repeatable kernels: what is trained here has them, and what has none says so."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from orchestrate.engine.determinism import make_deterministic, op_without_kernel
from ssl_methods.backbones import build
from tests.ssl_methods.methods.test_every_method import NAMES, build_method, train

CPU = torch.device("cpu")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Repeatable kernels for one test."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    make_deterministic(CPU, environment={})
    yield
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
    if compiler := sys.modules.get("torch._inductor.config"):
        compiler.deterministic = False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", ["tiny_resnet", "resnet18", "alexnet", "convnext_tiny", "swin_t", "vit_tiny_patch16_224"]
)
def test_backbones_train_with_repeatable_kernels_on_cpu(name: str, deterministic: None) -> None:
    torch.manual_seed(0)
    backbone = build.build(name)
    side = 28 if name == "tiny_resnet" else 224 if "vit" in name else 64
    images = torch.randn(2, 3, side, side)
    gradients = []
    for _ in range(2):
        backbone.zero_grad()
        backbone.eval()(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in backbone.parameters() if parameter.grad is not None])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_methods_train_with_repeatable_kernels_on_cpu(name: str, deterministic: None) -> None:
    first, again = (build_method(name) for _ in range(2))
    losses = [train(method, torch.optim.AdamW(method.parameters()), steps=3) for method in (first, again)]
    assert losses[0] == losses[1]


def test_operation_without_a_repeatable_kernel_is_named(deterministic: None) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    assert op_without_kernel(caught.value) == "put_"
    with pytest.raises(RuntimeError) as other:
        nn.Linear(2, 2)(torch.zeros(3))
    assert op_without_kernel(other.value) == ""


def test_cublas_is_told_its_workspace_unless_the_user_chose_one() -> None:
    # In a process of its own, because cuDNN's flags cannot be asked for on a machine without it.
    code = (
        "import torch\n"
        "from orchestrate.engine.determinism import make_deterministic\n"
        "for environment in ({}, {'CUBLAS_WORKSPACE_CONFIG': ':16:8'}):\n"
        "    make_deterministic(torch.device('cuda'), environment=environment)\n"
        "    print(environment['CUBLAS_WORKSPACE_CONFIG'])\n"
        "print(torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ), timeout=60
    )
    assert shown.stdout.split() == [":4096:8", ":16:8", "True", "False"]


@pytest.mark.parametrize("first", ["import torch._inductor.config", "pass"])
def test_compiler_is_deterministic_too_and_is_not_imported_for_that(first: str) -> None:
    code = (
        f"import sys\nimport torch\n{first}\n"
        "from orchestrate.engine.determinism import make_deterministic\n"
        "before = len(sys.modules)\n"
        "make_deterministic(torch.device('cpu'))\n"
        "print(len(sys.modules) - before)\n"
        "import torch._inductor.config as config\n"
        "print(config.deterministic)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.split() == ["0", "True"]

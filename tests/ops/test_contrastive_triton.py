"""The Triton kernels: interpreted on a CPU, on a CUDA device where there is one, and compiled for devices that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then nothing in this process can be compiled
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


@pytest.mark.parametrize("interpret", ["1", "0"], ids=["interpreter", "cuda"])
def test_kernels(repository, interpret):
    """In a process of their own: TRITON_INTERPRET counts only before triton is imported, and here it may have been."""
    if interpret == "0" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/ops/triton_worker.py"]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED or not PTXAS.exists(), reason="triton brings no ptxas, or interprets")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for(capability, monkeypatch, tmp_path):
    from imitate_ds.ops import contrastive_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for width in ("i32", 1):  # Triton compiles another kernel for a width of 1
        compile_kernel(kernels._q_kernel, capability, {"half_strength": "fp32", "width": width})
        compile_kernel(kernels._sumexp_kernel, capability, {"width": width})
        for q, out in (("*fp32", "*fp16"), (None, "*fp32")):
            compile_kernel(kernels._g_kernel, capability, {"q": q, "out": out, "width": width})


def compile_kernel(kernel, capability: int, types: dict) -> None:
    """To machine code, without a device. Arguments are float32 pointers, sizes int32; a type that is a value is fixed."""
    from imitate_ds.ops.contrastive_triton import TILES

    tile = TILES[capability // 10]
    fixed = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    fixed |= {name: value for name, value in types.items() if not isinstance(value, str)}
    sizes = dict.fromkeys(("first", "height", "width", "stride", "q_stride", "out_stride"), "i32")
    signature = {name: (sizes | types).get(name, "*fp32") for name in kernel.arg_names}
    signature |= dict.fromkeys(fixed, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, fixed)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    assert triton.compile(source, target, options={"num_warps": tile.warps}).asm["cubin"]


@pytest.mark.skipif(INTERPRETED, reason="triton interprets")
def test_setting_the_interpreter_too_late_is_said():
    from imitate_ds.ops.contrastive_triton import q_strip

    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET = 1: triton was imported before it was set"):
        q_strip(torch.eye(4), torch.eye(4), prior_strength=0.2, first=0)

"""Checks of what is installed: versions, accelerators, the fused kernels that training picks where it can.

Each imports what it looks at itself: an import that crashes or hangs is then one row of the table.
"""

import importlib.util
import io
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from imitate_ds.diagnosis.finding import Check, Finding, Options, absent, broken, gib, ok, slow
from imitate_ds.diagnosis.machine import is_network

PACKAGES = ("torch", "torchvision", "deepspeed", "transformers", "timm", "triton")
OURS = "imitate-ds"
OLD_LOCK_S = 15 * 60  # no compilation takes that long


def python_version(_: Options) -> Finding:
    try:
        wanted = SpecifierSet(metadata(OURS)["Requires-Python"])
    except PackageNotFoundError:
        return absent(f"{platform.python_version()}; {OURS} is not installed, so no ranges are known", "make setup")
    return _against(platform.python_version(), wanted, "install a Python of that range: make PYTHON=python3.12 setup")


def package_version(name: str) -> Check:
    """The check of one package against the range that our own distribution asks for."""

    def check(_: Options) -> Finding:
        wanted = _our_ranges().get(name, SpecifierSet())
        try:
            found = version(name)
        except PackageNotFoundError:
            if name == "triton":
                return absent("not installed", "needed on CUDA only, where it comes with torch")
            return broken("not installed", f"pip install '{name}{wanted}'")
        return _against(found, wanted, f"pip install '{name}{wanted}'")

    return check


def _against(found: str, wanted: SpecifierSet, advice: str) -> Finding:
    if not wanted.contains(found, prereleases=True):
        return broken(f"{found}, needed is {wanted}", advice)
    return ok(found)


def _our_ranges() -> dict[str, SpecifierSet]:
    try:
        needed = map(Requirement, requires(OURS) or [])
    except PackageNotFoundError:
        return {}
    return {item.name.lower(): item.specifier for item in needed if item.marker is None}


def accelerators(_: Options) -> Finding:
    """GPUs as the driver lists them, and as torch sees them."""
    import torch

    listed, asked = _listed_gpus(), os.environ.get("DS_ACCELERATOR", "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        if listed:
            built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or 'of no version'}"
            return broken(
                f"{len(listed)} GPU(s) that torch does not see: {listed[0]}; {built}{hidden}",
                "a torch for this driver (pytorch.org), a newer driver, or in a job: ask for GPUs (--gpus-per-node)",
            )
        if asked not in ("", "cpu"):
            return broken(f"none, but DS_ACCELERATOR={asked}{hidden}", "unset DS_ACCELERATOR")
        return absent(f"none; training runs on {cores} CPU core(s){hidden}")
    seen = [_describe_gpu(index) for index in range(torch.cuda.device_count())]
    driver = listed[0].split(", ")[-1] if listed else "unknown"
    text = f"{len(seen)} x {seen[0]}, driver {driver}{hidden}" if len(set(seen)) == 1 else "; ".join(seen) + hidden
    if asked == "cpu":
        return slow(f"{text}; DS_ACCELERATOR=cpu", "unset DS_ACCELERATOR to train on the GPU(s)")
    return ok(text)


def _describe_gpu(index: int) -> str:
    import torch

    about = torch.cuda.get_device_properties(index)
    return f"{about.name}, {gib(about.total_memory)}, compute capability {about.major}.{about.minor}"


def _listed_gpus() -> list[str]:
    """`name, driver` of each GPU that the driver knows; empty where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode:
        raise OSError(f"nvidia-smi: {(answer.stderr or answer.stdout).strip().splitlines()[0]}")
    return answer.stdout.strip().splitlines()


def attention(_: Options) -> Finding:
    """Which backends of scaled_dot_product_attention run here, tried one by one."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_cuda = _on_cuda()
    rows = torch.ones(
        1, 2, 64, 32, device="cuda" if on_cuda else "cpu", dtype=torch.bfloat16 if on_cuda else torch.float32
    )
    runs = []
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        with warnings.catch_warnings(action="ignore"), sdpa_kernel(getattr(SDPBackend, name)):
            try:
                torch.nn.functional.scaled_dot_product_attention(rows, rows, rows)
            except RuntimeError:
                continue  # torch says "no available kernel" so
        runs.append(name.removesuffix("_ATTENTION").lower())
    text = f"{', '.join(runs)} on {'CUDA' if on_cuda else 'CPU'}"
    if runs == ["math"]:
        return slow(text, "no fused attention: transformers use more memory; a GPU of compute capability 8.0 has it")
    return ok(text)


def triton_kernels(_: Options) -> Finding:
    """The kernels of our own loss: compiled, run, and compared with the definition."""
    import torch

    from imitate_ds.ops.contrastive import choose_backend, clinical_contrastive_loss

    device = torch.device("cuda" if _on_cuda() else "cpu")
    try:
        choose_backend("triton", device, samples=1)
    except ValueError as reason:
        return absent(
            str(reason).removeprefix("backend = 'triton': ").partition(";")[0],
            "objective.backend: auto takes another form",
        )
    rows = torch.nn.functional.normalize(torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0)), dim=-1).to(
        device
    )
    began = time.perf_counter()
    ours, definition = (
        clinical_contrastive_loss(rows[0], rows[1], temperature=0.1, backend=backend).item()
        for backend in ("triton", "dense")
    )
    text = f"{'compiled' if device.type == 'cuda' else 'interpreted'} and run in {time.perf_counter() - began:.1f} s"
    if not abs(ours - definition) < 1e-3 * abs(definition):
        return broken(f"{text}, but {ours:.6g} is not {definition:.6g}", "objective.backend: strips; and tell us")
    return ok(f"{text}, equal to the definition")


def fused_adam(_: Options) -> Finding:
    """What optim.name: auto takes on CUDA; DeepSpeed compiles it at the first start."""
    if not _on_cuda():
        return absent("for CUDA only", "on a CPU optim.name: auto is torch's own fused AdamW")
    if not _compatible("fused_adam"):
        return broken("DeepSpeed cannot build it here", "optim.name: adamw")
    if problem := _cuda_compiler_problem():
        return broken(f"cannot be compiled: {problem}", "load the CUDA module of torch's version, or optim.name: adamw")
    return ok("can be compiled")


def cpu_adam(_: Options) -> Finding:
    """DeepSpeed's own optimizer for offloaded parameters; torch's serves where it cannot be built."""
    if not _compatible("cpu_adam") or shutil.which("g++") is None:
        return absent("cannot be built here", "not needed: offloaded parameters are stepped by torch's AdamW")
    return ok("can be compiled")


def _compatible(op: str) -> bool:
    """DeepSpeed's verdict; it compiles nothing for it. `training.engine` is the one place that imports DeepSpeed."""
    from imitate_ds.training import engine

    return bool(engine.deepspeed.ops.__compatible_ops__.get(op))


def _cuda_compiler_problem() -> str:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    compiler = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not compiler.is_file():
        return "no nvcc (CUDA_HOME)"
    said = subprocess.run([str(compiler), "--version"], capture_output=True, text=True).stdout
    release = said.partition("release ")[2].partition(",")[0]
    if release.partition(".")[0] != (torch.version.cuda or "").partition(".")[0]:
        return f"nvcc is {release or 'of no version'}, torch is built for CUDA {torch.version.cuda}"
    return "" if shutil.which("g++") else "no g++"


def apex(_: Options) -> Finding:
    if importlib.util.find_spec("apex") is None:
        return absent(
            "not installed", "not needed; optim.name: apex_fused_adam and apex_fused_lamb want it, from source"
        )
    try:
        from apex.optimizers import FusedLAMB  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return absent(f"not NVIDIA's, or not built: {error}", "not needed; the apex on PyPI is something else")
    return ok("importable, with its fused optimizers")


def jpeg_decoder(_: Options) -> Finding:
    """simplejpeg, on every training step's way: a picture made here must come back."""
    from PIL import Image

    from imitate_ds.data.stored_images import decode_stored

    drawn = io.BytesIO()
    Image.linear_gradient("L").save(drawn, "JPEG", quality=95)
    began, times = time.perf_counter(), 100
    for _again in range(times):
        pixels = decode_stored(drawn.getvalue())
    each = (time.perf_counter() - began) / times
    if abs(float(pixels[0, 128].float().mean()) - 128) > 4:
        return broken("simplejpeg decodes to other pixels", "pip install --force-reinstall simplejpeg")
    return ok(f"simplejpeg {version('simplejpeg')}, {1e6 * each:.0f} us a radiograph of 256 pixels")


def dicom_decoder(_: Options) -> Finding:
    missing = [name for name in ("pydicom", "gdcm") if importlib.util.find_spec(name) is None]
    if missing:
        return absent(
            f"no {' and no '.join(missing)}", "pip install 'imitate-ds[dicom]' to read DICOM; shards need none"
        )
    import gdcm  # type: ignore[import-not-found]

    return ok(f"pydicom {version('pydicom')}, gdcm {gdcm.Version.GetVersion()}")


def stale_locks(_: Options) -> Finding:
    """A lock that a killed compilation left in the folder of compiled kernels: whoever compiles next waits for ever."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR", "")
    folders = [Path(chosen)] if chosen else list(Path(tempfile.gettempdir()).glob(f"imitate_ds-ext-{os.getuid()}-*"))
    stale = [lock for folder in folders for lock in folder.glob("**/lock") if _age_s(lock) > OLD_LOCK_S]
    if stale and chosen:
        return broken(f"{len(stale)} stale, {stale[0]}", f"rm -r {' '.join(str(lock.parent) for lock in stale[:3])}")
    if stale:
        return ok(f"{len(stale)} stale", "the next start of training removes them")
    if chosen and is_network(Path(chosen)):
        return slow(
            f"none; {chosen} is on a network", "unset TORCH_EXTENSIONS_DIR: a stale lock there stops every machine"
        )
    return ok("none stale")


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # released just now


def _on_cuda() -> bool:
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "") != "cpu"

"""Who may import whom (README, Architecture), read from the source with ast."""

import ast
import tomllib
from pathlib import Path

# room -> rooms of ours it may import, by longest matching prefix
MAY_IMPORT = {
    "batch": set(),
    "config": {"run_file"},
    "finetune_config": {"config", "run_file"},
    "benchmark_config": {"finetune_config", "run_file"},
    "devices": set(),
    "distributed": {"flight"},
    "flight": set(),
    "metrics": set(),
    "ops": {"distributed"},
    "run_file": set(),
    "data": {"batch", "config", "distributed", "finetune_config", "run_file"},
    "models": {"batch", "config", "finetune_config"},
    "heads": {"batch"},
    "objective": {"batch", "config", "distributed", "ops"},
    "training": {"batch", "config", "devices", "distributed", "flight", "run_file"},
    "export_folder": {"data.radiographs", "data.square"},
    "model_card": set(),
    "hub": {"batch", "config", "export_folder", "model_card", "models", "data.transforms"},
    "predictor": {
        "batch",
        "config",
        "data.transforms",
        "finetune_config",
        "heads",
        "models",
        "export_folder",
        "hub",
        "model_card",
    },
    "planned_runs": {"config", "data.shard_index", "finetune_config", "run_file", "training.run_state"},
    "scale_config": {"config", "run_file"},
    "recipe": {"batch", "config", "data", "distributed", "flight", "hub", "models", "objective", "ops", "training"},
    "planning": {"batch", "config", "data", "devices", "models", "objective", "ops", "recipe", "training"},
    "evaluation": {
        "batch",
        "flight",
        "config",
        "data",
        "distributed",
        "export_folder",
        "hub",
        "metrics",
        "ops",
        "run_file",
    },
    "diagnosis": {"data", "distributed", "ops", "training"},
}
ENTRANCES = {
    "pretrain",
    "finetune",
    "evaluate",
    "replay",
    "profiling",
    "doctor",
    "status",
    "launch",
    "cli",
    "benchmark",
    "scale",
}

# third-party package -> the only modules that may import it
ONLY_IN = {
    "deepspeed": {"training.engine"},
    "triton": {"ops.contrastive_triton"},
    "webdataset": {"data.shards"},
    "fsspec": {"data.shard_transport"},
    "aiohttp": {"data.shard_transport"},
    "simplejpeg": {"data.stored_images"},
    "pydicom": {"data.dicom", "data.dicom_display"},
    "pydantic": {"benchmark_config", "config", "finetune_config", "run_file", "scale_config"},
    "yaml": {"run_file"},
    "typer": {"cli"},
    "timm": {"models"},
    "transformers": {"models"},
    "pyarrow": {"evaluation.predictions"},
    "safetensors": {"hub", "predictor", "data.text_cache", "models", "training.tensor_files"},
    "huggingface_hub": {"export_folder", "models"},
    "segmentation_models_pytorch": {"heads"},
    "torchao": {"models.float8"},
    "pickle": set(),
}


def _modules(repository: Path) -> dict[str, ast.Module]:
    package = repository / "imitate_ds"
    modules = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = ast.parse(path.read_text())
    modules.pop("__init__", None)
    return modules


def _imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def test_arrows_go_down(repository):
    modules = _modules(repository)
    wrong = []
    for module, tree in modules.items():
        room = module.split(".")[0]
        if room in ENTRANCES:
            continue
        assert room in MAY_IMPORT, f"imitate_ds.{module} is in no room of the house; give it one here and in the README"
        for imported in _imports(tree):
            ours = imported.removeprefix("imitate_ds.")
            if imported.startswith("imitate_ds.") and ours in modules and not _within(ours, MAY_IMPORT[room] | {room}):
                wrong.append(f"imitate_ds.{module} imports {imported}")
    assert not wrong, wrong


def test_nothing_imports_an_entrance_but_those_that_start_others(repository):
    for module, tree in _modules(repository).items():
        for imported in _imports(tree):
            name = imported.removeprefix("imitate_ds.")
            if imported.startswith("imitate_ds.") and _within(name, ENTRANCES):
                assert module.split(".")[0] in ("cli", "benchmark", "profiling", "replay", "scale"), (
                    f"imitate_ds.{module} imports {imported}"
                )


def test_third_parties_stay_in_their_room(repository):
    for module, tree in _modules(repository).items():
        for imported in _imports(tree):
            package = imported.split(".")[0]
            if package in ONLY_IN:
                assert _within(module, ONLY_IN[package]), f"imitate_ds.{module} imports {package}"


def test_only_distributed_names_torch_distributed(repository):
    for module, tree in _modules(repository).items():
        for imported in _imports(tree):
            assert not imported.startswith("torch.distributed") or module == "distributed", f"{module}: {imported}"


def test_nothing_is_unpickled(repository):
    for module, tree in _modules(repository).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert safe, f"imitate_ds.{module}: torch.load without weights_only=True"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
                safe = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
                assert safe, f"imitate_ds.{module}: np.load without allow_pickle=False"


def test_every_folder_is_installed(repository):
    """The list is written by hand, and a folder that it lacks is missing in the wheel alone."""
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for kind in ("*.py", "*.yaml") for path in (repository / "imitate_ds").rglob(kind)}
    names = {".".join(folder.relative_to(repository).parts) for folder in folders}
    assert names | set(settings["package-dir"]) == set(settings["packages"])

"""Who may import whom, and where torch and other heavy names may appear: the table of docs/layout.md, held.

Imports are read with `ast`, those inside functions included. What importing a module really loads is looked
up in `sys.modules` of a fresh process.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmtrain"

BASE = {"errors", "units", "log", "files", "rng", "progress", "compiled", "parent"}

MAY_IMPORT = {  # room -> what it may import besides the base modules, as dotted prefixes below llmtrain
    "data": {"data"},
    "loader": {"loader", "data.config", "data.shards", "data.manifest", "data.pack"},
    "model": {"model"},
    "parallel": {"parallel"},
    "checkpoint": {"checkpoint"},
    "convert": {"convert", "checkpoint"},
    "planner": {
        "planner",
        "model.config",
        "model.size",
        "parallel.config",
        "parallel.topology",
        "parallel.compatibility",
    },
    "inference": {"inference", "model", "data.tokenizer", "loader.dataset", "loader.batches"},
    "export": {"export", "model", "data.tokenizer"},
    "tracking": {
        "tracking",
        "data.manifest",
        "model.config",
        "model.size",
        "planner.plan",
        "planner.interval",
        "planner.runs",
    },
    "launch": {"launch", "parallel.config", "parallel.topology"},
    "train": {
        "train",
        "checkpoint",
        "data.manifest",
        "loader",
        "model",
        "parallel",
        "inference",
        "tracking",
        "launch.preflight",
    },
}
MAY_IMPORT_EVERYTHING = {"cli", "bench"}

NAMED_ONLY_IN = {  # other people's package -> the only files or folders that may import it
    "deepspeed": {
        "train/deepspeed_engine.py",
        "train/pipeline_engine.py",
        "cli/train.py",  # imports it early, only to time it
        "bench/",
    },
    "accelerate": {"train/accelerate_engine.py"},
    "sentencepiece": {"data/tokenizer/", "bench/"},
    "tokenizers": {"data/tokenizer/"},
    "dask": {"data/engines/"},
    "distributed": {"data/engines/"},
    "dask_jobqueue": {"data/engines/slurm.py"},
    "wandb": {"tracking/"},
    "wandb_workspaces": {"tracking/"},
    "hydra": {"cli/"},
    "omegaconf": {"cli/"},
}
NO_TORCH_ROOMS = {"data", "planner", "launch", "tracking", "checkpoint", *BASE}
NO_TORCH_FILES = {
    "model/size.py",
    "model/partition.py",
    "parallel/balance.py",
    "parallel/compatibility.py",
    "parallel/topology.py",
    "parallel/volume.py",
    "train/capsule.py",
    "train/certificate.py",
    "train/changes.py",
    "train/deadline.py",
    "train/retries.py",
    "train/settings.py",
    "train/shrink.py",
    "train/spike_config.py",
    "train/spikes.py",
    "train/unread.py",
}
MAY_HOLD_CODE = {"__init__.py", "planner/__init__.py"}
"""The version; and `llmtrain.planner.predict`, which others call, found when it is asked for."""
LIGHT_VERBS = {
    "cli.plan",
    "cli.data",
    "cli.report",
    "cli.status",
    "cli.submit",
    "cli.dashboard",
    "cli.doctor",
    "cli.watch",
    "cli.tensorboard",
    "cli.train",
    "cli.verify",
    "cli.main",
    "cli.compose",
}
"""Verbs that login and CPU nodes run; `train` among them for check_only=true."""


def sources():
    """Every file of the package as (path below it, source)."""
    return [
        (path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def imported_names(source):
    """Every name imported at any depth; `from a.b import c` is a.b.c, and `from . import c` is ..c."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def is_below(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def is_torch_free(path):
    room = path.split("/")[0].removesuffix(".py")
    return room in NO_TORCH_ROOMS or path in NO_TORCH_FILES or path.endswith("/config.py")


def violations(path, source):
    """What the file at `path` (below llmtrain/) imports although it may not."""
    room = path.split("/")[0].removesuffix(".py")
    found = []
    for name in imported_names(source):
        outer = name.split(".")[0]
        if not outer:
            found.append(f"{path}: relative import of {name}; import by full path")
        elif outer == "llmtrain":
            target = name.removeprefix("llmtrain").lstrip(".")
            is_room = is_below(target, {*MAY_IMPORT, *MAY_IMPORT_EVERYTHING})
            allowed = BASE | MAY_IMPORT.get(room, set())
            if is_room and room not in MAY_IMPORT_EVERYTHING and not is_below(target, allowed):
                found.append(f"{path}: {room} may not import llmtrain.{target}")
        elif outer == "torch" and is_torch_free(path):
            found.append(f"{path}: imports torch, and must load without it")
        elif outer in NAMED_ONLY_IN and not path.startswith(tuple(NAMED_ONLY_IN[outer])):
            places = ", ".join(sorted(NAMED_ONLY_IN[outer]))
            found.append(f"{path}: imports {outer}, which is named only in {places}")
    return found


def test_every_import_is_in_the_table():
    found = [line for path, source in sources() for line in violations(path, source)]
    assert not found, "\n" + "\n".join(found)


def test_every_room_is_in_the_table():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms <= MAY_IMPORT.keys() | MAY_IMPORT_EVERYTHING
    assert modules <= BASE, (
        "a module beside the rooms is a base module: add it to the table and to docs/layout.md"
    )


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("data/scan.py", "import torch", "data/scan.py: imports torch, and must load without it"),
        ("train/config.py", "from torch import nn", "train/config.py: imports torch"),
        ("planner/laws.py", "def f():\n    import torch.nn", "planner/laws.py: imports torch"),
        ("files.py", "import torch", "files.py: imports torch"),
        (
            "model/block.py",
            "from llmtrain.parallel.tensor import x",
            "model may not import llmtrain.parallel.tensor",
        ),
        ("data/scan.py", "from llmtrain import train", "data may not import llmtrain.train"),
        ("files.py", "from llmtrain.data.shards import x", "files may not import llmtrain.data.shards.x"),
        ("loader/order.py", "from llmtrain.data.scan import x", "loader may not import llmtrain.data.scan.x"),
        ("parallel/mpu.py", "import llmtrain.model.block", "parallel may not import llmtrain.model.block"),
        (
            "tracking/report.py",
            "from llmtrain.cli.compose import x",
            "tracking may not import llmtrain.cli.compose.x",
        ),
        (
            "train/loop.py",
            "def f():\n    import deepspeed",
            "train/loop.py: imports deepspeed, which is named only in",
        ),
        (
            "train/assemble.py",
            "from omegaconf import OmegaConf",
            "imports omegaconf, which is named only in cli/",
        ),
        ("loader/rows.py", "import sentencepiece as spm", "imports sentencepiece, which is named only in"),
        ("train/loop.py", "import wandb", "imports wandb, which is named only in tracking/"),
        ("model/block.py", "from . import norm", "relative import of ..norm; import by full path"),
    ],
)
def test_a_forbidden_import_is_found(path, source, message):
    found = violations(path, source)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("loader/rows.py", "from llmtrain.data.manifest import read_manifest\nimport torch"),
        ("planner/plan.py", "from llmtrain.model import size, config\nimport numpy"),
        ("train/deepspeed_engine.py", "import deepspeed\nfrom llmtrain.loader.batches import Batch"),
        ("data/tokenizer/train.py", "def f():\n    import sentencepiece"),
        ("tracking/facts.py", "from llmtrain import __version__"),
        ("bench/step.py", "from llmtrain.train import loop\nimport torch"),
        ("model/block.py", "from llmtrain import rng, errors\nfrom torch import nn"),
    ],
)
def test_an_allowed_import_is_let_through(path, source):
    assert violations(path, source) == []


SLURM_IS_NAMED_IN = ("launch/", "data/engines/slurm.py")


def test_slurm_is_named_only_where_jobs_are_asked_for():
    """Names of its variables and commands, in any string of the code."""
    found = [
        f"{path}: {node.value!r}"
        for path, source in sources()
        if not path.startswith(SLURM_IS_NAMED_IN)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.startswith(("SLURM_", "sbatch", "srun", "squeue"))
    ]
    assert not found, "\n".join(found)


def test_init_files_hold_a_docstring_and_no_code():
    for path, source in sources():
        if path.endswith("__init__.py"):
            body = ast.parse(source).body
            assert ast.get_docstring(ast.parse(source)), f"{path} does not say what the package is for"
            assert path in MAY_HOLD_CODE or len(body) == 1, f"{path} holds code"


def test_light_modules_load_without_torch_and_deepspeed():
    paths = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path, _ in sources()]
    light = [
        name
        for name, (path, _) in zip(paths, sources(), strict=True)
        if is_torch_free(path) or name in LIGHT_VERBS
    ]
    program = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module("llmtrain." + name)
    for heavy in ("torch", "deepspeed", "transformers"):
        if heavy in sys.modules:
            sys.exit(f"importing llmtrain.{{name}} loads {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"cli.plan", "model.size", "train.config", "planner.plan"} <= set(light)


def test_the_planner_and_its_verb_load_only_numpy_hydra_and_what_they_need():
    program = """
import sys
import llmtrain.cli.plan
heavy = {"torch", "pyarrow", "numba", "rich", "matplotlib", "datasets", "wandb", "sentencepiece", "xxhash"}
found = sorted(heavy & set(sys.modules))
if found:
    sys.exit(f"llmtrain.cli.plan loads {found}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

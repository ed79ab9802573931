"""The wheel: built without the network, and planning from it with only numpy and hydra-core installed."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

pytest.importorskip("hatchling", reason="the wheel is built with hatchling")

PLANNERS_WORLD = ("numpy", "hydra-core", "omegaconf", "antlr4-python3-runtime", "PyYAML", "packaging")
"""numpy, and hydra-core with what it requires."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    ]
    subprocess.run([*command, "--wheel-dir", folder, PROJECT], check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("llmtrain-*.whl")
    return built


@pytest.fixture(scope="module")
def planners_python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel, numpy and hydra-core, and nothing else.

    The two are linked from the environment of this test, file by file as their records list them, so that no
    network is needed and no neighbour of theirs slips in.
    """
    root = tmp_path_factory.mktemp("venv")
    venv.create(root, with_pip=False, symlinks=True)
    (site_packages,) = root.glob("lib/python*/site-packages")
    for distribution in PLANNERS_WORLD:
        link_distribution(distribution, site_packages)
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        root / "bin" / "python",
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, "--quiet", wheel], check=True, capture_output=True, timeout=120)
    return root / "bin" / "python"


def link_distribution(name, site_packages):
    files = importlib.metadata.files(name)
    assert files, f"{name} has no record of its files"
    for file in files:
        if ".." in file.parts or file.suffix == ".pyc":  # console scripts, and caches
            continue
        target = site_packages / Path(*file.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(Path(file.locate()).resolve())


def test_the_wheel_holds_conf_and_the_planners_tables(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (PROJECT / "conf").rglob("*.yaml"):
        assert f"llmtrain/{path.relative_to(PROJECT).as_posix()}" in names
    assert "llmtrain/planner/tables/loss/besiroglu_bootstrap.csv" in names
    assert "llmtrain/planner/tables/loss/chinchilla_runs.csv" in names


def test_the_wheel_holds_the_whole_package_and_its_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (PROJECT / "llmtrain").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(PROJECT).as_posix() in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "docs/", "conf/")) for name in names)


def test_the_wheel_brings_the_console_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "llmtrain = llmtrain.cli.main:main" in archive.read(entry_points).decode()


def test_plan_runs_from_another_folder_with_only_numpy_and_hydra(planners_python, tmp_path):
    command = [planners_python.with_name("llmtrain"), "plan", "budget.gpu_hours=100", "cluster=h100_sxm_8x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "100 GPU-hours = 12.5 h on 8 GPUs" in done.stdout
    assert "WHAT EVERY LAW WOULD TRAIN" in done.stdout
    assert (tmp_path / "plans/experiment/planned.yaml").is_file()
    assert (tmp_path / "plans/planned.plan.json").is_file()
    assert (tmp_path / "plans/planned.plan.html").is_file()


def test_nothing_else_is_installed_there(planners_python):
    program = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()), sep='\\n')"
    done = subprocess.run([planners_python, "-c", program], capture_output=True, text=True, check=True)
    assert {name.lower() for name in done.stdout.split()} == {
        "llmtrain",
        *(name.lower() for name in PLANNERS_WORLD),
    }


def test_conf_is_found_inside_the_installed_package(planners_python, tmp_path):
    program = "from llmtrain.cli.compose import conf_folder; print(conf_folder())"
    done = subprocess.run(
        [planners_python, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("site-packages/llmtrain/conf")


def declared(group=None):
    """Names of the packages that pyproject.toml asks for, in lower case."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] if group is None else project["optional-dependencies"][group]
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted} - {"llmtrain"}


def imported():
    """Names of the other people's packages that the package imports."""
    found = set()
    for path in (PROJECT / "llmtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            found |= {name.split(".")[0] for name in names}
    return found - sys.stdlib_module_names - {"llmtrain"}


DISTRIBUTION_OF = {
    "hydra": "hydra-core",
    "omegaconf": "hydra-core",
    "yaml": "pyyaml",
    "markupsafe": "jinja2",
    "dask_jobqueue": "dask-jobqueue",
    "wandb_workspaces": "wandb-workspaces",
}
"""Packages whose import has another name than what is installed, or comes with another one."""
RIVALS = {"transformers", "datatrove", "loguru"}
"""Imported by benchmarks only, and installed by those who run them."""


NOT_IMPORTED = {"aiohttp", "lxml_html_clean", "protobuf"}
"""Declared although no line of ours imports it."""


def test_what_is_imported_is_what_is_declared():
    names = {DISTRIBUTION_OF.get(name, name) for name in imported()}
    assert names - RIVALS == (declared() | declared("cluster") | declared("trafilatura")) - NOT_IMPORTED
    assert not NOT_IMPORTED & names, "imported by now: take it off the list"


def test_every_dependency_is_explained_and_nothing_else():
    text = (PROJECT / "docs/dependencies.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    explained = {name.strip() for row in rows for name in row.split(",")} - {"package"}
    development = {name for name in declared("dev") if not name.startswith("types-")}
    extras = declared("cluster") | declared("submitit") | declared("trafilatura") | declared("rivals")
    assert explained - {"types-*"} == declared() | extras | development

"""Every command block of README.md and of docs/data.md runs as it stands, from top to bottom, in one
folder."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from llmtrain.cli.compose import to_dataclass
from llmtrain.cli.data_trace import TraceRoot
from llmtrain.cli.main import PARTS
from llmtrain.cli.report import ReportRoot
from llmtrain.data.config import DataConfig
from llmtrain.data.content.config import TrainQualityConfig
from llmtrain.data.explain import ExplainConfig
from llmtrain.data.formats.config import ExportConfig, ImportConfig
from llmtrain.data.inspect import InspectConfig

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<mark><!-- not run by the tests: [^\n]+ -->\n)?```bash\n(?P<commands>.*?)```", re.DOTALL
)

SHORTER = {
    "launch/single_node.sh": "train.total_tokens=4096 schedule.warmup_tokens=1024 data.max_epochs=1000"
    " train.eval_rows=2 save.every_steps=2",
}
"""What the test adds to a command so that it ends in seconds; the rest of the line stays."""


SCHEMAS = {
    "data": DataConfig,
    "data_explain": ExplainConfig,
    "data_trace": TraceRoot,
    "data_import": ImportConfig,
    "data_export": ExportConfig,
    "inspect_shards": InspectConfig,
    "data_train_quality": TrainQualityConfig,
    "report": ReportRoot,
}


def blocks(name: str = "README.md") -> list[tuple[str, bool]]:
    """The commands of each block, and whether it is marked as not run."""
    text = (REPOSITORY / name).read_text()
    found = [(match["commands"], match["mark"] is not None) for match in BLOCK.finditer(text)]
    assert len(found) == text.count("```bash"), "a block is not closed"
    return found


def commands_of(block: str) -> list[str]:
    """The block's lines without comments, continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.split("  # ")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """What a user has after cloning: the scripts, and some text of their own."""
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    (tmp_path / "conf").symlink_to(REPOSITORY / "conf")
    texts = []
    for name in ("argparse", "ast", "datetime", "decimal", "email", "json", "logging", "re", "statistics"):
        texts += [inspect.getdoc(member) or "" for _, member in inspect.getmembers(import_module(name))]
    (tmp_path / "my_texts").mkdir()
    with gzip.open(tmp_path / "my_texts" / "part-0.jsonl.gz", "wt") as handle:
        for text in dict.fromkeys(texts):
            handle.write(json.dumps({"text": text}) + "\n")
    return tmp_path


def environment() -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "NPROC": "1",
    }


def test_every_command_block_of_the_readme_runs(workspace: Path) -> None:
    ran = 0
    for block, is_marked in blocks():
        if is_marked:
            continue
        for command in commands_of(block):
            shorter = next((more for start, more in SHORTER.items() if start in command), "")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", f"{command} {shorter}"],
                cwd=workspace,
                env=environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            ran += 1
    assert ran >= 6, "the README shows more than this"


PAGE = """<html><head><title>Otters</title></head>
<body><nav><a href="/">Home</a></nav><article><h1>Otters</h1>
<p>The otter sleeps on its back, and holds on to a neighbour so that the river does not part them.</p>
</article></body></html>"""


def web_archive(number: int) -> bytes:
    """One record of a WARC: a page that a server sent."""
    http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n{PAGE} {number}".encode()
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://otters.example/{number}\r\n"
        f"WARC-Date: 2024-05-18T01:58:10Z\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return head.encode() + http + b"\r\n\r\n"


@pytest.mark.slow
def test_every_command_block_of_the_data_tutorial_runs(tmp_path: Path) -> None:
    (tmp_path / "crawl").mkdir()
    with gzip.open(tmp_path / "crawl" / "one.warc.gz", "wb") as handle:
        handle.writelines(web_archive(number) for number in range(3))
    ran = 0
    for block, is_marked in blocks("docs/data.md"):
        if is_marked:
            continue
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        ran += 1
    assert ran >= 15, "the tutorial shows more than this"


def test_every_command_of_the_data_tutorial_has_settings_that_exist(tmp_path: Path) -> None:
    for name, text in re.findall(r"> settings/(\S+) <<'END'\n(.*?)END\n", tutorial(), re.DOTALL):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    seen = 0
    for block, _ in blocks("docs/data.md"):
        for line in block.splitlines():
            if not line.startswith("llmtrain "):
                continue
            words = shlex.split(line.replace("--config-dir settings ", ""))[1:]
            verb = " ".join(words[:2]) if " ".join(words[:2]) in PARTS else words[0]
            name = verb.replace(" ", "_").replace("-", "_")
            ConfigStore.instance().store(name=f"{name}_schema", node=SCHEMAS[name])
            path = [f"hydra.searchpath=[file://{tmp_path}]"]
            with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
                composed = compose(name, [*path, *words[len(verb.split()) :]])
            to_dataclass(composed, SCHEMAS[name])
            seen += 1
    assert seen >= 30, "the tutorial shows more than this"


def tutorial() -> str:
    return (REPOSITORY / "docs/data.md").read_text()


def test_every_file_that_a_page_names_is_there() -> None:
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        images = re.findall(r'src="([^"]+)"', page.read_text())
        for path in [*links, *images]:
            assert path.startswith("http") or (page.parent / path).exists(), f"{page.name} names {path}"


def test_every_command_that_the_demo_suggests_composes() -> None:
    script = (REPOSITORY / "launch" / "demo.sh").read_text()
    hints = re.findall(
        r"^  ((?:llmtrain|launch/single_node\.sh) .*)$", script.split("To try next:")[1], re.MULTILINE
    )
    assert len(hints) == 3
    for hint in hints:
        command = hint.replace("launch/single_node.sh", "llmtrain train").replace("$run", "runs/demo")
        done = subprocess.run(
            ["bash", "-c", f"{command} --cfg job"],
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stderr}"

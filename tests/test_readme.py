"""Every command block of README.md runs as it stands, from top to bottom, in one folder."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<mark><!-- not run by the tests: [^\n]+ -->\n)?```bash\n(?P<commands>.*?)```", re.DOTALL
)

SHORTER = {
    "launch/single_node.sh": "train.total_tokens=4096 schedule.warmup_tokens=1024 data.max_epochs=1000"
    " train.eval_rows=2 train.save_every_steps=2",
}
"""What the test adds to a command so that it ends in seconds; the rest of the line stays."""


def blocks() -> list[tuple[str, bool]]:
    text = (REPOSITORY / "README.md").read_text()
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


def test_every_command_block_of_the_readme_runs(workspace: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "NPROC": "1",
    }
    ran = 0
    for block, is_marked in blocks():
        if is_marked:
            continue
        for command in commands_of(block):
            shorter = next((more for start, more in SHORTER.items() if start in command), "")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", f"{command} {shorter}"],
                cwd=workspace,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            ran += 1
    assert ran >= 6, "the README shows more than this"


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (REPOSITORY / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    images = re.findall(r'src="([^"]+)"', text)
    for path in [*links, *images]:
        assert (REPOSITORY / path).exists(), f"README.md names {path}"


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

from __future__ import annotations

from pathlib import Path

from llmtrain import compiled
from llmtrain.data.text import edit


def test_machine_code_is_stamped_with_the_sources_of_what_it_calls() -> None:
    stamp = compiled.source_stamp("llmtrain.data.text.edit")
    assert edit._edit._cache._cache_file._source_stamp == stamp
    assert stamp != compiled.source_stamp("llmtrain.data.text.sentences")


def stamp_of(root: Path, **sources: str) -> bytes:
    folder = root / "llmtrain" / "data" / "text"
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    compiled.source_stamp.cache_clear()
    return compiled.source_stamp("llmtrain.data.text.outer", root)


def test_the_stamp_changes_with_a_module_that_is_imported_in_any_way(tmp_path: Path) -> None:
    first = stamp_of(
        tmp_path,
        outer="from llmtrain.data.text import (\n    middle,\n)\n",
        middle="from llmtrain.data.text.inner import f\n",
        inner="f = 1\n",
        other="g = 1\n",
    )
    assert stamp_of(tmp_path, other="g = 2\n") == first
    assert stamp_of(tmp_path, inner="f = 2\n") != first
    assert stamp_of(tmp_path, inner="f = 1\n") == first
    circular = stamp_of(tmp_path, inner="from llmtrain.data.text import outer\nf = 1\n")
    assert circular != first

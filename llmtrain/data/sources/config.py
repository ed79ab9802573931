"""Settings of the input: where text comes from and how it is read. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llmtrain.errors import ConfigError


class Format(Enum):
    """How the text lies on disk."""

    python_docs = "python_docs"
    """Docstrings, comments and text files of this Python installation."""
    jsonl = "jsonl"
    """One JSON object a line; .gz and .zst are read as they are."""
    parquet = "parquet"
    text = "text"
    """Plain text, cut as `text_unit` says; .gz and .zst are read as they are."""
    datasets = "datasets"
    """Whatever `datasets.load_dataset` or `load_from_disk` opens."""


class TextUnit(Enum):
    """What one document of a plain text file is."""

    file = "file"
    block = "block"
    """Lines between blank lines."""
    line = "line"


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the text comes from."""

    name: str
    """Names the data folder and the manifest."""
    format: Format
    paths: list[str] = field(default_factory=list)
    """Files, folders or globs (`**` goes into folders), in any order; each file counts once. Hidden files in
    folders, and what a run wrote into `out`, are left out. Not for python_docs and datasets."""
    text_field: str = "text"
    """JSON key or column that holds the text: jsonl, parquet, datasets."""
    source_field: str | None = None
    """JSON key or column that names a document's source; null: the file's name."""
    text_unit: TextUnit = TextUnit.file
    """Only for text."""
    max_text_bytes: int | None = None
    """Only for python_docs: files are drawn in hash order until their text reaches this many bytes;
    null: all."""
    draw_seed: int = 0
    """Only for python_docs: another seed draws other files."""
    max_document_bytes: int = 20_000_000
    """A longer record goes to the quarantine as `absurd_length`."""
    dataset: str | None = None
    """Only for datasets: first argument of load_dataset, or the folder with dataset_on_disk."""
    dataset_config: str | None = None
    dataset_split: str | None = "train"
    dataset_files: list[str] = field(default_factory=list)
    """data_files of load_dataset, for the builders json, csv, text, parquet."""
    dataset_on_disk: bool = False
    """Whether `dataset` is a folder that save_to_disk wrote."""

    def __post_init__(self) -> None:
        if self.format in (Format.jsonl, Format.parquet, Format.text) and not self.paths:
            raise ConfigError(
                f"corpus={self.format.name} needs corpus.paths, as in "
                f"`llmtrain data corpus={self.format.name} corpus.paths=[texts/*]`"
            )
        if self.format in (Format.python_docs, Format.datasets) and self.paths:
            raise ConfigError(
                f"corpus.paths has no effect with corpus.format={self.format.name}; leave it out"
            )
        if self.format is Format.datasets and self.dataset is None:
            raise ConfigError(
                "corpus=datasets needs corpus.dataset: a name on the Hub, a folder, or "
                "json|csv|text|parquet with corpus.dataset_files"
            )
        if self.max_text_bytes is not None and self.format is not Format.python_docs:
            raise ConfigError(f"corpus.max_text_bytes has no effect with corpus.format={self.format.name}")
        if self.max_text_bytes is not None and self.max_text_bytes < 1:
            raise ConfigError(f"corpus.max_text_bytes={self.max_text_bytes} must be at least 1, or null")
        if self.max_document_bytes < 1:
            raise ConfigError(f"corpus.max_document_bytes={self.max_document_bytes} must be at least 1")

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
    """One JSON object a line; .gz, .zst, .bz2 and .xz are read as they are."""
    parquet = "parquet"
    text = "text"
    """Plain text, cut as `text_unit` says; .gz, .zst, .bz2 and .xz are read as they are."""
    warc = "warc"
    """Web archives: pages of WARC files, texts of WET files; compressed or not."""
    datasets = "datasets"
    """Whatever `datasets.load_dataset` or `load_from_disk` opens."""


class TextUnit(Enum):
    """What one document of a plain text file is."""

    file = "file"
    block = "block"
    """Lines between blank lines."""
    line = "line"


class Extraction(Enum):
    """How a page of HTML becomes text."""

    resiliparse = "resiliparse"
    """Main content, by resiliparse's rules (Bevendorff et al. 2018, https://resiliparse.chatnoir.eu); the
    fastest, and DCLM's choice (arXiv:2406.11794, section 3.2)."""
    trafilatura = "trafilatura"
    """Main content, by trafilatura (Barbaresi 2021), in favour of precision as FineWeb asked for it
    (arXiv:2406.17557, section 3.1). Some 20 times slower. Needs `pip install llmtrain[trafilatura]`."""
    raw_text = "raw_text"
    """All visible text of the page, menus too."""


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the text comes from."""

    name: str
    """Names the data folder and the manifest."""
    format: Format
    paths: list[str] = field(default_factory=list)
    """Files, folders or globs (`**` goes into folders), in any order; each file counts once. Hidden files in
    folders, and what a run wrote into `out`, are left out. URLs that fsspec opens (s3://, gs://, hf://,
    https://, ...) may stand among them, with globs where that file system lists its files. Not for
    python_docs and datasets."""
    text_field: str = "text"
    """JSON key or column that holds the text, `outer.inner` for a nested one: jsonl, parquet, datasets."""
    source_field: str | None = None
    """JSON key or column that names a document's source; null: the file's name."""
    url_field: str | None = None
    """JSON key or column that holds a document's URL, for URL rules. A WARC says it itself."""
    metadata_fields: list[str] = field(default_factory=list)
    """JSON keys or columns to carry along with a document, as text."""
    text_unit: TextUnit = TextUnit.file
    """Only for text."""
    extraction: Extraction = Extraction.resiliparse
    """Only for warc."""
    max_text_bytes: int | None = None
    """Only for python_docs: files are drawn in hash order until their text reaches this many bytes;
    null: all."""
    draw_seed: int = 0
    """Only for python_docs: another seed draws other files."""
    max_document_bytes: int = 20_000_000
    """A longer record goes to the quarantine as `absurd_length`. Of a page: before extraction."""
    max_expansion: float = 500.0
    """How many times its size compressed data may grow to; beyond it, and beyond 64 MiB, it goes to the
    quarantine as `zip_bomb`. gzip reaches 1032 at most (https://zlib.net/zlib_tech.html); text stays
    below 20."""
    dataset: str | None = None
    """Only for datasets: first argument of load_dataset, or the folder with dataset_on_disk."""
    dataset_config: str | None = None
    dataset_split: str | None = "train"
    dataset_revision: str | None = None
    """Commit, tag or branch of a data set of the Hub; null: the newest."""
    dataset_files: list[str] = field(default_factory=list)
    """data_files of load_dataset, for the builders json, csv, text, parquet."""
    dataset_on_disk: bool = False
    """Whether `dataset` is a folder that save_to_disk wrote."""
    streaming: bool = False
    """Whether the data set is read shard by shard as it comes, without a copy on disk first."""

    def __post_init__(self) -> None:
        self._check_paths()
        if self.max_text_bytes is not None and self.format is not Format.python_docs:
            raise ConfigError(f"corpus.max_text_bytes has no effect with corpus.format={self.format.name}")
        if self.max_text_bytes is not None and self.max_text_bytes < 1:
            raise ConfigError(f"corpus.max_text_bytes={self.max_text_bytes} must be at least 1, or null")
        if self.max_document_bytes < 1:
            raise ConfigError(f"corpus.max_document_bytes={self.max_document_bytes} must be at least 1")
        if not self.max_expansion >= 1:
            raise ConfigError(f"corpus.max_expansion={self.max_expansion} must be at least 1")
        if self.format not in (Format.jsonl, Format.parquet, Format.datasets):
            for name in ("source_field", "url_field", "metadata_fields"):
                if getattr(self, name):
                    raise ConfigError(
                        f"corpus.{name} has no effect with corpus.format={self.format.name}; leave it out"
                    )
        if self.streaming and (self.format is not Format.datasets or self.dataset_on_disk):
            raise ConfigError(
                "corpus.streaming=true is for corpus.format=datasets, without corpus.dataset_on_disk"
            )

    def _check_paths(self) -> None:
        if self.format in (Format.jsonl, Format.parquet, Format.text, Format.warc) and not self.paths:
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

    @property
    def columns(self) -> list[str]:
        """Every field that is read, the text's first, each once."""
        wanted = [self.text_field, self.source_field, self.url_field, *self.metadata_fields]
        return list(dict.fromkeys(name for name in wanted if name))

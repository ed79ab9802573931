"""`llmtrain evaluate checkpoint=runs/demo`: held-out loss, perplexity and bits per byte, beside gzip and xz.

The compressors get the bytes that the model is judged on: the held-out documents' normalised text, back to
back.
"""

from __future__ import annotations

import io
import json
import logging
import lzma
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from rich.console import Console
from rich.table import Table

from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.compose import run_verb
from llmtrain.cli.restore import Precision, load_transformer
from llmtrain.data.config import Packing
from llmtrain.data.manifest import verify
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import write_json
from llmtrain.inference.perplexity import bits_per_byte, held_out_loss, perplexity
from llmtrain.loader.batches import held_out_batches
from llmtrain.loader.dataset import Rows

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluateRoot:
    checkpoint: str
    """A run folder (its newest whole checkpoint is taken), or one step's folder in its checkpoints/."""
    micro_batch_rows: int = 8
    """Rows a forward. Changes memory and speed only."""
    device: str | None = None
    """null: a GPU if there is one, else the CPU."""
    precision: Precision = Precision.fp32
    data_folder: str | None = None
    """Where the run's data folder lies now; null: where the run says."""
    out: str | None = None
    """JSON file for the figures; null: evaluation.json in the run folder."""

    def __post_init__(self) -> None:
        if self.micro_batch_rows < 1:
            raise ConfigError(f"micro_batch_rows={self.micro_batch_rows} must be at least 1")


@dataclass(frozen=True)
class CompressedSizes:
    """Bytes of the held-out text, and of what the compressors make of it."""

    text: int
    gzip: int
    xz: int


def evaluate(cfg: EvaluateRoot) -> None:
    """Measure, write the JSON, print the table."""
    loaded = load_transformer(
        place_of(cfg.checkpoint),
        data_folder=None if cfg.data_folder is None else Path(cfg.data_folder),
        device=cfg.device,
        precision=cfg.precision,
    )
    verify(loaded.data_folder, loaded.manifest, content=True)
    data = loaded.state["config"]["data"]
    packing = Packing[data["packing"]]
    if len(data.get("sources", {})) > 1:
        log.warning(
            "the run reads a mixture of %s; this is the held-out text of %s alone, data_folder=FOLDER takes "
            "another",
            *(", ".join(data["sources"]), loaded.data_folder),
        )
    rows = Rows(loaded.data_folder, loaded.manifest, "held_out", data["seq_len"], packing)
    device = loaded.model.device
    begin = time.perf_counter()
    batches = held_out_batches(rows, micro_batch_rows=cfg.micro_batch_rows, dp_rank=0, dp_size=1)
    loss_sum, num_targets = held_out_loss(loaded.model, batches, device=device)
    evaluate_s = time.perf_counter() - begin
    text_bytes = sum(shard.text_bytes for shard in loaded.manifest.shards if shard.split == "held_out")
    num_documents = sum(shard.num_documents for shard in loaded.manifest.shards if shard.split == "held_out")
    sizes = compressed_sizes(loaded.data_folder / loaded.manifest.held_out_text)
    if sizes.text != text_bytes:
        raise DataError(
            f"{loaded.data_folder / loaded.manifest.held_out_text} holds {sizes.text} bytes of text, and the "
            f"held-out shards encode {text_bytes}; run `llmtrain data` again"
        )
    figures: dict[str, Any] = {
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.step,
        "held_out_loss": loss_sum / max(1, num_targets),
        "perplexity": perplexity(loss_sum, num_targets),
        "bits_per_byte": bits_per_byte(
            loss_sum,
            num_documents=num_documents,
            vocab_size=loaded.manifest.tokenizer.vocab_size,
            text_bytes=text_bytes,
        ),
        "gzip_bits_per_byte": 8 * sizes.gzip / text_bytes,
        "xz_bits_per_byte": 8 * sizes.xz / text_bytes,
        "num_targets": num_targets,
        "num_documents": num_documents,
        "text_bytes": text_bytes,
        "first_tokens": "log2(vocab_size) bits each",
        "precision": cfg.precision.name,
        "device": str(device),
        "evaluate_s": evaluate_s,
    }
    out = Path(cfg.out) if cfg.out is not None else None
    if out is None and loaded.run_folder is not None:
        out = loaded.run_folder / "evaluation.json"
    if out is not None:
        write_json(out, figures)
    Console().print(_table(figures))
    if out is not None:
        print(f"figures: {out}")


def compressed_sizes(path: Path) -> CompressedSizes:
    """Sizes under `gzip -9` and `xz -9` of all texts of a .jsonl.zst, back to back."""
    text, gzip_bytes, xz_bytes = 0, 0, 0
    gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    xz = lzma.LZMACompressor(preset=9)
    for content in _texts(path):
        text += len(content)
        gzip_bytes += len(gzip.compress(content))
        xz_bytes += len(xz.compress(content))
    return CompressedSizes(text, gzip_bytes + len(gzip.flush()), xz_bytes + len(xz.flush()))


def _texts(path: Path) -> Iterator[bytes]:
    num_read = 0
    try:
        with open(path, "rb") as handle, zstandard.ZstdDecompressor().stream_reader(handle) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
                yield json.loads(line)["text"].encode()
                num_read += 1
    except (OSError, ValueError, KeyError, zstandard.ZstdError) as error:
        raise DataError(
            f"{path}, record {num_read + 1}: damaged: {error}; run `llmtrain data` again"
        ) from error


def _table(figures: dict[str, Any]) -> Table:
    table = Table(title=f"{figures['checkpoint']} on held-out text", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("meaning")
    for what, key, form, meaning in (
        ("loss", "held_out_loss", ".4f", f"nats per token, mean of {figures['num_targets']:,} targets"),
        ("perplexity", "perplexity", ",.2f", "exp of the loss"),
        ("bits per byte", "bits_per_byte", ".4f", f"of {figures['text_bytes']:,} bytes of text"),
        ("  gzip -9", "gzip_bits_per_byte", ".4f", "on the same bytes"),
        ("  xz -9", "xz_bits_per_byte", ".4f", "on the same bytes"),
    ):
        table.add_row(what, format(figures[key], form), meaning)
    return table


def main() -> None:
    run_verb("evaluate", EvaluateRoot, evaluate)

"""The rival of `llmtrain bench data`: datatrove, an optional extra (`pip install llmtrain[rivals]`).

Everything runs as its own examples run it: the defaults of its filters and of MinHash, its spaCy words, one
process
(its executor with one worker). Its classes are called directly where only one step is timed, so that reading,
writing and its start-up are not counted against it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_DEDUP_STAGES = 4


def is_installed() -> bool:
    return importlib.util.find_spec("datatrove") is not None and importlib.util.find_spec("spacy") is not None


def filter_seconds(texts: Sequence[str]) -> float:
    """CPU seconds of Gopher repetition, Gopher quality, C4 and FineWeb, each filter on every text."""
    _quiet()
    from datatrove.data import Document  # noqa: PLC0415 - optional, and slow to load
    from datatrove.pipeline.filters import (  # noqa: PLC0415 - as above
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    filters: list[Any] = [
        GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(), FineWebQualityFilter(),
    ]  # fmt: skip
    for each in filters:  # loads its word tokenizer
        each.filter(Document(text=texts[0] * 3, id="warm"))
    started = time.process_time()
    for number, text in enumerate(texts):
        for each in filters:
            each.filter(Document(text=text, id=str(number)))
    return time.process_time() - started


def signature_seconds(texts: Sequence[str]) -> float:
    """CPU seconds of MinHash signatures: 5 words, 14 x 8 permutations."""
    _quiet()
    from datatrove.pipeline.dedup import MinhashDedupSignature  # noqa: PLC0415 - optional, and slow to load

    step = MinhashDedupSignature(output_folder="memory://signatures")
    step.get_signature(step.get_shingles(texts[0] * 3))
    started = time.process_time()
    for text in texts:
        shingles = step.get_shingles(text)
        if shingles.size:
            step.get_signature(shingles)
    return time.process_time() - started


def dedup_seconds(jsonl: Path, folder: Path) -> tuple[float, int]:
    """Wall seconds of its four MinHash stages from JSONL to the kept documents as JSONL, one worker; and how
    many documents it keeps."""
    _quiet()
    from datatrove.executor import LocalPipelineExecutor  # noqa: PLC0415 - optional, and slow to load
    from datatrove.pipeline.dedup import (  # noqa: PLC0415 - as above
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader  # noqa: PLC0415 - as above
    from datatrove.pipeline.writers import JsonlWriter  # noqa: PLC0415 - as above

    def reader() -> Any:
        return JsonlReader(str(jsonl.parent), glob_pattern=jsonl.name)

    signatures, buckets, removed, kept = (
        str(folder / name) for name in ("sig", "buckets", "removed", "kept")
    )
    num_buckets = 14
    stages: list[tuple[list[Any], int]] = [
        ([reader(), MinhashDedupSignature(output_folder=signatures)], 1),
        ([MinhashDedupBuckets(input_folder=signatures, output_folder=buckets)], num_buckets),
        ([MinhashDedupCluster(input_folder=buckets, output_folder=removed)], 1),
        ([reader(), MinhashDedupFilter(input_folder=removed), JsonlWriter(kept, compression=None)], 1),
    ]
    assert len(stages) == NUM_DEDUP_STAGES
    started = time.monotonic()
    for number, (pipeline, num_tasks) in enumerate(stages):
        log_folder = str(folder / f"log{number}")
        LocalPipelineExecutor(pipeline=pipeline, tasks=num_tasks, workers=1, logging_dir=log_folder).run()
    seconds = time.monotonic() - started
    num_kept = 0
    for path in Path(kept).glob("*.jsonl"):
        with open(path, encoding="utf-8") as handle:
            num_kept += sum(1 for line in handle if json.loads(line))
    return seconds, num_kept


def _quiet() -> None:
    """Its log lines would be half of what a bench prints."""
    from loguru import logger  # noqa: PLC0415 - comes with datatrove

    logger.remove()
    logging.getLogger("datatrove").setLevel(logging.ERROR)

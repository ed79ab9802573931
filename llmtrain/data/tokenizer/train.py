"""Train a SentencePiece model. The same texts and settings give the same bytes.

Choices, and why: no normalisation but the escape of U+2581, no dummy prefix and untouched white space make
decode(encode(x)) == x; runs of spaces are pieces, so indentation is cheap; a line end is in no longer
piece, because the trainer sees lines one by one, and becomes the byte piece <0x0A>. The space gets a piece
however rare it is: without one SentencePiece would write it as the bytes of U+2581. SentencePiece silently
skips sentences over 4,192 bytes by default; the bound is lifted here, and longer lines are cut.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from llmtrain.data.config import TokenizerConfig
from llmtrain.data.tokenizer.sentencepiece_model import ESCAPE, SPACE_MARK, with_escape
from llmtrain.errors import DataError

TRAIN_VERSION = 2
"""Part of the folder's key: raise it when the same documents and settings would give another model."""
MAX_SENTENCE_BYTES = 1 << 30
MAX_LINE_CHARS = 1 << 20
"""Of what the trainer gets at once. Only pieces across such a cut go unseen."""
FIM_PIECES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
MASK_PIECE = "<mask>"


def control_pieces(cfg: TokenizerConfig) -> list[str]:
    """Pieces that text never becomes: sentinels of objectives, in the order of their ids."""
    fim = list(FIM_PIECES) if cfg.fim else []
    mask = [MASK_PIECE] if cfg.mask else []
    return [*fim, *mask, *(f"<extra_id_{number}>" for number in range(cfg.num_sentinels))]


def train_tokenizer(texts: Iterable[str], cfg: TokenizerConfig) -> bytes:
    """Return the model file's bytes.

    Raises:
        DataError: the texts hold too few different words for `cfg.vocab_size`; says the largest possible
        size.
    """
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules, back = Path(folder) / "escape.tsv", Path(folder) / "unescape.tsv"
        rules.write_text("".join(f"{_hex(mark)}\t{_hex(to)}\n" for mark, to in ESCAPE.items()))
        back.write_text("".join(f"{_hex(to)}\t{_hex(mark)}\n" for mark, to in ESCAPE.items()))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(texts),
                model_writer=model,
                model_type=cfg.model_type.name,
                vocab_size=cfg.vocab_size,
                byte_fallback=cfg.byte_fallback,
                character_coverage=cfg.character_coverage,
                required_chars=SPACE_MARK,
                split_digits=cfg.split_digits,
                normalization_rule_tsv=str(rules),
                denormalization_rule_tsv=str(back),
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=MAX_SENTENCE_BYTES,
                shuffle_input_sentence=False,
                num_threads=1,  # recorded in the model file
                user_defined_symbols=cfg.user_symbols,
                control_symbols=control_pieces(cfg),
                minloglevel=2,
                **_ids(cfg),
            )
        except RuntimeError as error:
            raise DataError(_explain(str(error), cfg)) from error
    return with_escape(model.getvalue())


def _ids(cfg: TokenizerConfig) -> dict[str, Any]:
    given = {"unk": cfg.unk_id, "bos": cfg.bos_id, "eos": cfg.eos_id, "pad": cfg.pad_id}
    return {f"{name}_id": -1 if id_ is None else id_ for name, id_ in given.items()}


def _hex(text: str) -> str:
    return " ".join(f"{ord(char):X}" for char in text)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in re.split(f"[\n\0{SPACE_MARK}]", text):  # the trainer ends a sentence at NUL
            for at in range(0, len(line), MAX_LINE_CHARS):
                yield line[at : at + MAX_LINE_CHARS]


def _explain(message: str, cfg: TokenizerConfig) -> str:
    largest = re.search(r"value <= (\d+)", message)
    if largest:
        return (
            f"tokenizer.vocab_size={cfg.vocab_size} is larger than the text allows, "
            f"at most {largest.group(1)}; lower it, or give more text"
        )
    if "!sentences_.empty()" in message:
        return "the tokenizer's sample holds no text to train on; give other text, or tokenizer.path"
    smallest = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if smallest:
        return (
            f"tokenizer.vocab_size={cfg.vocab_size} is too small: the text's characters alone need "
            f"{smallest.group(1)}; raise it, or lower tokenizer.character_coverage={cfg.character_coverage}"
        )
    return f"SentencePiece could not train a vocabulary of {cfg.vocab_size}: {message.strip()}"

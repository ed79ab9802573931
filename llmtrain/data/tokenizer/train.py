"""Train a SentencePiece BPE model. The same texts and settings give the same bytes.

Choices, and why: identity normalisation, no dummy prefix and untouched white space make
decode(encode(x)) == x; runs of spaces are pieces, so indentation is cheap; a line end is in no longer
piece, because the trainer sees lines one by one, and becomes the byte piece <0x0A>. The space gets a piece
however rare it is: without one SentencePiece would write it as the bytes of U+2581, which decode to that
character. SentencePiece silently skips sentences over 4,192 bytes by default; the bound is lifted here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from llmtrain.data.config import TokenizerConfig
from llmtrain.data.tokenizer.tokenizer import SPACE_MARK
from llmtrain.errors import DataError

KIND = "sentencepiece_bpe"
TRAIN_VERSION = 1
"""Part of the folder's key: raise it when the same documents and settings would give another model."""
MAX_SENTENCE_BYTES = 1 << 30


def train_tokenizer(texts: Iterable[str], cfg: TokenizerConfig) -> bytes:
    """Return the model file's bytes.

    Raises:
        DataError: the texts hold too few different words for `cfg.vocab_size`; says the largest possible
        size.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=cfg.vocab_size,
            byte_fallback=True,
            character_coverage=cfg.character_coverage,
            required_chars=SPACE_MARK,
            split_digits=cfg.split_digits,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            shuffle_input_sentence=False,
            num_threads=1,  # recorded in the model file
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), cfg)) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in re.split(f"[\n{SPACE_MARK}]", text):
            if line:
                yield line


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

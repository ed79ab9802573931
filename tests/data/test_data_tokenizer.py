from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmtrain import compiled
from llmtrain.data.config import TokenizerConfig
from llmtrain.data.tokenizer import words
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.tokenizer.sentencepiece_model import (
    MODEL_NAME,
)
from llmtrain.data.tokenizer.tokenizer import FACTS_NAME, Tokenizer
from llmtrain.data.tokenizer.train import train_tokenizer
from llmtrain.data.tokenizer.words import WordEncoder
from llmtrain.errors import DataError
from llmtrain.files import write_json

ALPHABET = "katelo the  .\n\t\x00\u2581\u2585<s></s><0x0A>042é日😀\u0301\ufdd0\ufdd1\ufdd2"
TEXT = st.text(alphabet=ALPHABET, max_size=60) | st.text(max_size=30)
PROPERTY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(TEXT)
@example("\u2581")
@example("\u2581 \u2581\n</s>")
@PROPERTY
def test_decoding_gives_back_the_very_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert b"".join(tokenizer.pieces(ids)) == text.encode()


@given(st.lists(TEXT, max_size=6))
@PROPERTY
def test_looking_words_up_gives_the_ids_of_sentencepiece(
    tokenizer: Tokenizer, batch_of: Callable[[list[str]], tuple[Any, Any]], texts: list[str]
) -> None:
    text, offsets = batch_of(texts)
    encoder = WordEncoder(tokenizer)
    for _ in range(2):  # with an empty and with a filled store
        ids, lengths = encoder.encode(text, offsets)
        parts = np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
        assert [part.tolist() for part in parts] == [[*tokenizer.encode(t), tokenizer.eos_id] for t in texts]


def test_looking_words_up_holds_while_its_store_grows_and_starts_anew(
    tokenizer: Tokenizer,
    batch_of: Callable[[list[str]], tuple[Any, Any]],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(words, "START_CAPACITY", 4)
    monkeypatch.setattr(words, "MAX_STORE_BYTES", 300)
    encoder = WordEncoder(tokenizer)
    for first in range(0, len(texts), 10):
        text, offsets = batch_of(texts[first : first + 10])
        ids, lengths = encoder.encode(text, offsets)
        assert encoder.differing(text, offsets, ids, lengths, np.arange(10)) == 0


def test_a_wrong_id_is_noticed(
    tokenizer: Tokenizer, batch_of: Callable[[list[str]], tuple[Any, Any]], texts: list[str]
) -> None:
    text, offsets = batch_of(texts[:3])
    encoder = WordEncoder(tokenizer)
    ids, lengths = encoder.encode(text, offsets)
    ids[int(lengths[0]) + 1] += 1
    assert encoder.differing(text, offsets, ids, lengths, np.arange(3)) == 1


def test_words_are_cut_only_where_no_piece_goes_on(tokenizer: Tokenizer) -> None:
    joined = words.joined_bytes(tokenizer)
    assert joined[ord("t"), ord("h")]
    assert not joined[ord("\n")].all()
    assert not joined[ord("a"), ord(" ")]
    assert joined[:, 0x80:0xC0].all()


def test_control_pieces_in_a_text_stay_text(tokenizer: Tokenizer) -> None:
    for text in ("</s>", "a</s>b", "<unk>", "<0x0A>"):
        ids = tokenizer.encode(text)
        assert len(ids) > 1
        assert tokenizer.decode(ids) == text


def test_every_digit_is_a_token_and_a_line_end_is_its_byte(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("4242")) == 4
    assert tokenizer.encode("\n\n").tolist() == [tokenizer.byte_ids[10]] * 2


def test_training_is_a_function_of_texts_and_settings(texts: list[str]) -> None:
    cfg = TokenizerConfig(vocab_size=500)
    assert train_tokenizer(texts, cfg) == train_tokenizer(iter(texts), cfg)
    assert train_tokenizer(texts[1:], cfg) != train_tokenizer(texts, cfg)


def test_a_vocabulary_larger_than_the_text_allows_says_the_largest_possible() -> None:
    with pytest.raises(
        DataError, match=r"vocab_size=8000 is larger than the text allows, at most (\d+)"
    ) as caught:
        train_tokenizer(["one two three, four five"] * 9, TokenizerConfig(vocab_size=8000))
    largest = int(str(caught.value).split("at most ")[1].split(";")[0])
    train_tokenizer(["one two three, four five"] * 9, TokenizerConfig(vocab_size=largest))


def test_a_vocabulary_smaller_than_the_characters_says_what_they_need(texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"vocab_size=260 is too small: .* need 2\d\d; raise it"):
        train_tokenizer(texts, TokenizerConfig(vocab_size=260, character_coverage=1.0))


def test_text_without_words_is_an_error_not_a_crash() -> None:
    for texts in ([], ["\u2581\u2581"]):
        with pytest.raises(DataError, match="sample holds no text to train on"):
            train_tokenizer(texts, TokenizerConfig(vocab_size=300))


@pytest.mark.parametrize("num_spaces", [0, 1])
def test_a_space_is_a_piece_however_rare_it_is(tmp_path: Path, num_spaces: int) -> None:
    letters = random.Random(0).choices("abcdefgh", k=20_000)
    text = "".join(letters) + " a" * num_spaces
    (tmp_path / MODEL_NAME).write_bytes(train_tokenizer([text], TokenizerConfig(vocab_size=300)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a b  \u2581 c ")) == "a b  \u2581 c "


def test_half_a_surrogate_pair_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="half a surrogate pair"):
        tokenizer.encode("a\ud800b")


def test_a_missing_tokenizer_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at .*llmtrain data"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / MODEL_NAME).write_bytes(b"no model")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_changed_model_is_told_from_its_fingerprint(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / MODEL_NAME).write_bytes((tokenizer_folder / MODEL_NAME).read_bytes())
    write_json(tmp_path / FACTS_NAME, {"fingerprint": "0" * 64})
    with pytest.raises(
        DataError, match=r"is damaged: its sha256 is .* facts.json says 000\d*; delete .* run"
    ):
        load_tokenizer(tmp_path)


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiled.numba.njit

    def no_cache(*args: Any, **options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(compiled.numba, "njit", no_cache)
    assert compiled.compiled(lambda number: number + 1)(1) == 2

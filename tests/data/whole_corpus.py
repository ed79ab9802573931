"""A small corpus in which every step of `llmtrain data` has something to do, and settings with all of them
on. Made up from a seed; three sources, several files."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.data.config import (
    DataConfig,
    HeldOutConfig,
    PackConfig,
    ShardsConfig,
    StopAfter,
    TokenizerConfig,
)
from llmtrain.data.content.config import (
    ContentConfig,
    DecontaminationConfig,
    EvaluationConfig,
    LanguageConfig,
    PiiConfig,
    UrlsConfig,
)
from llmtrain.data.dedup.config import DedupConfig, LineConfig, NearConfig, NgramConfig, Survivor
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.filters.config import EditsConfig, RulesConfig
from llmtrain.data.sources.config import CorpusConfig, Format

_ENGLISH = (
    "the be to of and that have with a in it for not on as you do at this but his by from they we say "
    "her she or an will my one all would there their what so up out if about who get which go me when "
    "make can like time no just him know take people into year your good some could them see other than "
    "then now look only come its over think also back after use two how our work first well way even "
    "new want because any these give day most us house river summer winter garden window letter doctor "
    "village mountain teacher bridge market captain kitchen morning evening forest island silver engine "
    "history music picture station story"
)
_GERMAN = (
    "der die das und ist nicht ein eine mit auf für von dem den im sich auch es an werden aus er hat "
    "dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber "
    "vor zur bis mehr"
)
WORDS, GERMAN = _ENGLISH.split(), _GERMAN.split()
QUESTION = "how many grey cats sleep on the old bridge when seven of them walk to the market"
BOILERPLATE = (
    "This site is run by volunteers and every gift helps us to keep it open for all.",
    "Please write to the people at the village house when you find a mistake in the text.",
    "All stories were read aloud in the garden before they came to this page of ours.",
)


def sentences(draw: random.Random, count: int, words: Sequence[str] = WORDS) -> list[str]:
    """Lines of two sentences each."""

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(8, 14))).capitalize() + draw.choice(".?!")

    return [f"{sentence()} {sentence()}" for _ in range(count)]


def story(seed: int, num_lines: int = 5) -> str:
    return "\n".join(sentences(random.Random(seed), num_lines))


def slightly_changed(text: str, seed: int, num_words: int = 2) -> str:
    draw = random.Random(seed)
    words = text.split(" ")
    for at in draw.sample(range(len(words)), num_words):
        words[at] = draw.choice(["otherwise", "seldom", "yesterday"])
    return " ".join(words)


def documents(num_plain: int = 60, first: int = 0) -> list[dict[str, Any]]:
    """Records of every kind, in an order that mixes them. `first` makes others of the same kinds."""
    plain = [story(1000 * first + number) for number in range(num_plain)]
    few = max(2, num_plain // 12)
    texts = [*plain]
    texts += plain[:few]  # copies
    texts += [slightly_changed(text, seed) for seed, text in enumerate(plain[few : 3 * few])]
    texts += [  # made of three others
        "\n".join(line for text in plain[at : at + 3] for line in text.split("\n")[1:4]) for at in range(few)
    ]
    texts += ["\n".join([*BOILERPLATE, story(5000 + 1000 * first + at, 3)]) for at in range(few)]
    texts += [
        "\n".join([*BOILERPLATE, f"Only {at} days in summer are left for us now."]) for at in range(few)
    ]
    texts += [
        f"{story(7000 + 1000 * first + at)}\nWrite to jane.doe{at}@mail.com or bob@post.org today please."
        for at in range(few)
    ]
    texts += [
        f"{story(8000 + at)}\nThis page needs javascript to be read.\nmenu\nHome | News\n\n\nend"
        for at in range(few)
    ]
    texts += [f"{story(9000 + at, 3)}\nTell me {QUESTION}?" for at in range(2)]
    texts += ["\n".join(sentences(random.Random(at), 4, GERMAN)) for at in range(few)]
    texts += ["Much too short.", "", "   ", "menu\nhome\nnews", "\x00\x01", "{ curly }\r\n"]
    texts += [f"{story(1)}\nWe found lorem ipsum in it again."]
    texts += [f"{story(2)}\nA very odious word is in this last line."]
    texts += ["\n".join(["The same line is here again and it is long."] * 9)]
    random.Random(first).shuffle(texts)
    made = []
    for number, text in enumerate(texts):
        host = "bad.example" if number % 23 == 7 else "good.example"
        made.append(
            {
                "text": text,
                "site": "abc"[number % 3],
                "url": f"http://{host}/{first}/{number}",
                "rating": number,
            }
        )
    return made


def write_corpus(folder: Path, num_plain: int = 60, first: int = 0) -> list[str]:
    """Write three files, one of them compressed, with bad records in two; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(document).encode() for document in documents(num_plain, first)]
    third = len(lines) // 3
    parts = [lines[:third], lines[third : 2 * third], lines[2 * third :]]
    parts[0][3:3] = [b'{"text": "broken', b'{"body": 1}', b"", b'{"text": "\xff", "site": "a"}']
    parts[2][5:5] = [b'{"text": 7}', json.dumps({"text": "long " * 30_000, "site": "b"}).encode()]
    paths = [folder / "one.jsonl", folder / "two.jsonl.gz", folder / "three.jsonl"]
    for path, part in zip(paths, parts, strict=True):
        content = b"\n".join(part) + b"\n"
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return [str(path) for path in paths]


def write_lists(folder: Path) -> None:
    """The files that `whole_config` names: blocked addresses, bad words, an evaluation set."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "domains").write_text("bad.example\n")
    (folder / "bad_words.txt").write_text("odious\n")
    (folder / "items.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")


def whole_config(folder: Path, paths: list[str], out: Path, **changes: Any) -> DataConfig:
    """Everything on: C4's edits, rules of every kind, language, private data, block list, evaluation set, all
    four kinds of deduplication, small shards, two lengths of rows."""
    write_lists(folder)
    values: dict[str, Any] = {
        "corpus": CorpusConfig(
            name="jsonl", format=Format.jsonl, paths=paths, source_field="site", url_field="url",
            metadata_fields=["rating"], max_document_bytes=100_000,
        ),
        "edits": EditsConfig(
            strip_lines=True, max_blank_lines=0, max_word_chars=1000, strip_citations=True,
            terminal_marks='.?!"', min_words_per_line=5, drop_javascript_lines=True, drop_policy_lines=True,
            count_page_signals=True, bad_words_file=str(folder / "bad_words.txt"),
        ),
        "content": ContentConfig(
            language=LanguageConfig(enabled=True),
            pii=PiiConfig(email="<EMAIL>", ip_address="<IP>", phone="<PHONE>", api_key="<KEY>"),
            urls=UrlsConfig(block=[str(folder / "domains")]),
            decontamination=DecontaminationConfig(
                sets=[EvaluationConfig(path=str(folder / "items.jsonl"), fields=["question"], name="cats")]
            ),
        ),
        "rules": RulesConfig(
            languages=["en"], min_language_score=0.2, max_blocked_urls=0, min_words=25, max_words=100_000,
            min_distinct_stop_words=2, max_duplicate_line_fraction=0.3, max_top_2gram_char_fraction=0.2,
            max_lorem_ipsum_lines=0, max_curly_bracket_lines=0, min_sentences=3, max_bad_words=0,
            max_contaminated_ngrams=0, min_edited_terminal_line_fraction=0.12,
        ),
        "dedup": DedupConfig(
            near=NearConfig(enabled=True), lines=LineConfig(enabled=True, max_removed_share=0.6),
            ngrams=NgramConfig(enabled=True, num_words=5, max_share=0.7), survivor=Survivor.longest,
        ),
        "held_out": HeldOutConfig(fraction=0.1),
        "tokenizer": TokenizerConfig(vocab_size=450),
        "shards": ShardsConfig(text_bytes=8_000),
        "pack": PackConfig(seq_lens=[64, 128]),
        "engine": EngineConfig(kind=EngineKind.inline),
        "max_quarantine_share": 0.2,
        "stop_after": StopAfter.pack,
        "out": str(out),
    }  # fmt: skip
    return DataConfig(**(values | changes))


def output_of(out: Path) -> dict[str, bytes]:
    """Every file that training may read, and the Parquet files with their listing."""
    files = [out / name for name in ("manifest.json", "documents.json") if (out / name).exists()]
    for kind in ("shards", "packs", "tokenizer", "documents"):
        files += sorted(path for path in (out / kind).rglob("*") if path.is_file())
    assert files, f"nothing was written to {out}"
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def summary_of(out: Path) -> dict[str, Any]:
    """The summary of the only verdicts in a data folder."""
    (path,) = (out / "verdicts").glob("*/summary.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found

"""The rules as a table: every one has a setting, a preset's values, and a line in the documentation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from llmtrain.data.filters import chain
from llmtrain.data.filters.chain import RULES
from llmtrain.data.filters.config import EditsConfig, RulesConfig, check_rules
from llmtrain.data.filters.rule import Bound
from llmtrain.errors import ConfigError, DataError

ROOT = Path(__file__).parents[3]
PRESETS = {path.stem: path for path in sorted((ROOT / "conf/rules").glob("*.yaml"))}
OFF = {rule.setting: None for rule in RULES}
NUMERIC = [rule for rule in RULES if rule.bound is not Bound.one_of]


def rules(**changes: Any) -> RulesConfig:
    return RulesConfig(**(OFF | changes))


def columns(rule, counted, over=None):
    """Signals of one rule alone; of several counted ones, all but the first are 1."""
    found = {name: np.ones(len(counted), dtype=np.int64) for name in rule.signals}
    found[rule.counted[0]] = np.array(counted) - (len(rule.counted) - 1)
    if rule.over:
        found[rule.over] = np.array(over or [1] * len(counted)) + (1 if rule.less else 0)
    return found


def test_every_setting_is_one_rules_and_every_rule_has_one():
    settings = [rule.setting for rule in RULES]
    assert sorted(settings) == sorted({item.name for item in fields(RulesConfig)})
    assert len({rule.reason for rule in RULES}) == len(RULES)
    assert dict(zip((rule.reason for rule in RULES), settings, strict=True)) == chain.SETTING_OF_REASON


def test_the_name_of_a_setting_says_which_way_it_bounds():
    for rule in RULES:
        prefix = {Bound.at_least: "min_", Bound.at_most: "max_", Bound.one_of: "languages"}[rule.bound]
        assert rule.setting.startswith(prefix)


@pytest.mark.parametrize("rule", NUMERIC, ids=lambda rule: rule.reason)
def test_a_value_equal_to_the_bound_is_kept_and_one_beyond_it_dropped(rule):
    worse = -1 if rule.bound is Bound.at_least else 1
    bound, over = (0.5, [10, 10]) if rule.setting.endswith(("_fraction", "_ratio")) else (5, None)
    counted = [5, 5 + worse]
    assert list(chain.value(rule, columns(rule, counted, over))) == [
        count / (10 if over else 1) for count in counted
    ]
    ((reason, mask),) = chain.dropped_by(columns(rule, counted, over), rules(**{rule.setting: bound}))
    assert (reason, mask.tolist()) == (rule.reason, [False, True])


@pytest.mark.parametrize("rule", NUMERIC, ids=lambda rule: rule.reason)
def test_zero_is_a_bound_and_null_is_none(rule):
    signals = columns(rule, [0, 3])
    assert list(chain.dropped_by(signals, rules())) == []
    ((_, mask),) = chain.dropped_by(signals, rules(**{rule.setting: 0}))
    assert mask.tolist() == [False, rule.bound is Bound.at_most]


def test_a_ratio_over_nothing_is_over_one():
    rule = next(rule for rule in RULES if rule.reason == "few_alphabetic_words")
    signals = {"num_alphabetic_words": np.array([0]), "num_segments": np.array([0])}
    assert chain.value(rule, signals).tolist() == [0.0]
    ((_, mask),) = chain.dropped_by(signals, rules(min_alphabetic_word_fraction=0.8))
    assert mask.tolist() == [True]


def test_languages_keep_the_codes_that_are_listed():
    signals = {"language": np.array(["en", "de", "", "fr"])}
    ((reason, mask),) = chain.dropped_by(signals, rules(languages=["en", "fr"]))
    assert (reason, mask.tolist()) == ("wrong_language", [False, True, True, False])
    assert np.isnan(chain.value(next(rule for rule in RULES if rule.setting == "languages"), signals)).all()


def test_a_score_that_is_not_a_number_drops():
    signals = {"quality": np.array([0.5, np.nan], dtype=np.float32)}
    ((_, mask),) = chain.dropped_by(signals, rules(min_quality=0.5))
    assert mask.tolist() == [False, True]


def test_a_rule_without_its_signal_says_which_one():
    with pytest.raises(
        DataError, match=r"low_quality \(rules\.min_quality\) needs the signal quality.*=null"
    ):
        list(chain.dropped_by({}, rules(min_quality=0.5)))


def test_the_order_is_that_of_the_table():
    signals = {name: np.zeros(1, dtype=np.int64) for rule in RULES for name in rule.signals}
    signals["language"] = np.array(["en"])
    everything = rules(**{rule.setting: ["en"] if rule.bound is Bound.one_of else 1 for rule in RULES})
    assert [reason for reason, _ in chain.dropped_by(signals, everything)] == [rule.reason for rule in RULES]


def test_formulas_are_made_of_signals():
    formulas = {rule.reason: rule.formula for rule in RULES}
    assert formulas["too_short"] == "num_words"
    assert formulas["many_symbols"] == "(num_hashes + num_ellipses) / num_segments"
    assert formulas["edited_duplicate_line_chars"] == (
        "edited_num_duplicate_line_chars / (edited_num_chars - edited_num_newlines)"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_words": 9, "max_words": 8}, r"rules\.min_words=9 is above rules\.max_words=8; null"),
        (
            {"max_duplicate_5gram_char_fraction": 1.5},
            r"rules\.max_duplicate_5gram_char_fraction=1\.5 must lie",
        ),
        (
            {"min_sentences": -1},
            r"rules\.min_sentences=-1 must be 0 or more, or be null to switch the rule off",
        ),
        ({"max_hash_word_ratio": float("nan")}, r"rules\.max_hash_word_ratio=nan must be 0 or more"),
        ({"languages": []}, r"rules\.languages is empty: every document would go; null keeps all"),
    ],
)
def test_a_bound_that_cannot_be_meant_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        rules(**settings)


def test_a_quality_score_may_be_bounded_below_zero():
    assert rules(min_quality=-1.5).min_quality == -1.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_blank_lines": -1}, r"edits\.max_blank_lines=-1 must be 0 or more"),
        ({"max_line_uppercase_fraction": 2}, r"edits\.max_line_uppercase_fraction=2 must lie in 0\.\.1, or"),
        ({"terminal_marks": ""}, r"edits\.terminal_marks is empty: every line would go, or be null"),
    ],
)
def test_an_edit_that_cannot_be_meant_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        EditsConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_sentences": 3}, r"rules\.min_sentences=3 needs edits\.count_page_signals=true"),
        ({"max_bad_words": 0}, r"rules\.max_bad_words=0 needs edits\.bad_words_file, with one word"),
        (
            {"max_removed_word_fraction": 0.05},
            r"rules\.max_removed_word_fraction=0\.05 needs one of RefinedWeb's edits: edits\.max_line_upper",
        ),
    ],
)
def test_a_rule_that_needs_an_edit_says_so(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_rules(rules(**settings), EditsConfig())


@dataclass(kw_only=True)
class Root:
    """What a preset may set."""

    rules: RulesConfig = field(default_factory=rules)
    edits: EditsConfig = field(default_factory=EditsConfig)


def composed(*names: str) -> Root:
    config = OmegaConf.merge(OmegaConf.structured(Root), *(OmegaConf.load(PRESETS[name]) for name in names))
    root = OmegaConf.to_object(config)
    assert isinstance(root, Root)
    return root


def test_the_presets_are_those_that_were_published():
    assert PRESETS.keys() == {
        "none",
        "gopher_quality",
        "gopher_repetition",
        "c4_paper",
        "fineweb_paper",
        "fineweb_code",
        "dclm_refinedweb",
        "code",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_says_its_source_and_sets_keys_at_the_root(name):
    root = composed(name)
    check_rules(root.rules, root.edits)
    package, comment, *_ = PRESETS[name].read_text(encoding="utf-8").splitlines()
    assert package == "# @package _global_"
    assert comment.startswith("# ")
    assert (root == Root()) == (name == "none")


def test_presets_combine_and_the_last_one_wins():
    root = composed("gopher_quality", "gopher_repetition", "c4_paper")
    assert (root.rules.min_words, root.rules.max_duplicate_10gram_char_fraction) == (50, 0.10)
    assert (root.rules.min_sentences, root.edits.min_words_per_line) == (3, 5)
    assert composed("c4_paper", "fineweb_code").edits.terminal_marks is None
    assert composed("fineweb_code", "c4_paper").edits.terminal_marks == '.?!"'


def test_fineweb_as_published_and_as_run_differ_where_the_paper_and_the_code_do():
    paper, code = (yaml.safe_load(PRESETS[name].read_text()) for name in ("fineweb_paper", "fineweb_code"))
    different = {
        (group, key): (paper[group][key], code[group][key])
        for group in paper
        for key in paper[group]
        if paper[group][key] != code[group][key]
    }
    assert different == {
        ("edits", "min_words_per_line"): (5, 3),
        ("rules", "min_sentences"): (3, 5),
        ("rules", "max_edited_duplicate_line_char_fraction"): (0.1, 0.01),
        ("rules", "max_edited_newline_word_ratio"): (None, 0.3),
    }


def table_rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading of docs/data_rules.md, code marks taken off."""
    text = (ROOT / "docs/data_rules.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    lines = text.partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [[cell.replace("`", "") for cell in row] for row in rows]


def test_the_documentation_lists_every_rule_with_its_formula_and_source():
    rows = {row[0]: row for row in table_rows("Rules")[2:]}
    assert list(rows) == [rule.reason for rule in RULES]
    for rule in RULES:
        _, setting, formula, source, example = rows[rule.reason]
        assert (setting, formula, source) == (f"{rule.bound} {rule.setting}", rule.formula, rule.source)
        assert example


@pytest.mark.parametrize("group", ["rules", "edits"])
def test_the_documentation_lists_every_value_of_every_preset(group):
    heading = {"rules": "Bounds of the presets", "edits": "Edits of the presets"}[group]
    head, _, *rows = table_rows(heading)
    shown = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    names = [name for name in PRESETS if name != "none"]
    values = {name: yaml.safe_load(PRESETS[name].read_text()).get(group, {}) for name in names}
    assert set(shown) == {key for found in values.values() for key in found}
    for key, cells in shown.items():
        for name, cell in cells.items():
            assert cell == (str(values[name][key]).lower() if key in values[name] else ""), (name, key)
    assert {name for cells in shown.values() for name in cells} == {name for name in names if values[name]}

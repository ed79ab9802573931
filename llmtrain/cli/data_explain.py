"""`llmtrain data explain`: every signal, rule and verdict of one document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.cli.compose import run_verb
from llmtrain.data.explain import Cluster, ExplainConfig, Explanation, Relative, as_json, explain
from llmtrain.data.trace import OutputFormat
from llmtrain.units import format_bytes

SHOWN_BELOW = ("removed_", "num_pii_")
"""Beginnings of signals that are told as what was cut out and masked."""
STYLES = {"drops": "bold red", "keeps": "green", "off": "dim", "not measured": "dim"}


def main() -> None:
    run_verb("data_explain", ExplainConfig, show)


def show(cfg: ExplainConfig) -> None:
    found = explain(cfg)
    if cfg.format is OutputFormat.json:
        print(json.dumps(as_json(found), ensure_ascii=False, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width, and 80 columns break the formulas
        console.width = 140
    for line in head(found):
        console.print(line, soft_wrap=True)
    if any(rule.verdict != "off" for rule in found.rules):
        console.print(rules_table(found))
    else:
        console.print(f"\nAll {len(found.rules)} rules are off.\n")
    console.print(signals_table(found))
    for line in rest(found):
        console.print(line, soft_wrap=True)


def head(found: Explanation) -> Iterator[Text]:
    """Who the document is, and what became of it."""
    if found.reason:
        drop = next((rule for rule in found.rules if rule.is_reason), None)
        why = (
            f": {drop.formula} = {shown(drop.value)}, {drop.setting} asks {drop.asks} {shown(drop.bound)}"
            if drop
            else ""
        )
        verdict = Text(f"dropped as {words(found.reason)}{why}", "bold red")
    else:
        verdict = Text(f"kept, {'held out' if found.verdict == 'held_out' else 'for training'}", "bold green")
    facts: dict[str, str | Text] = {
        "document": found.id,
        "verdict": verdict,
        "file": f"{found.path}, record {found.record:,}",
        "source": found.source,
        **({"url": found.url} if found.url else {}),
        **({"metadata": listed} if (listed := _listed(found.metadata)) else {}),
        **({"language": language} if (language := _language(found)) else {}),
        "text": f"{format_bytes(found.text_bytes)}{f', hash {found.content}' if found.content else ''}",
    }
    for name, fact in facts.items():
        yield Text.assemble((f"{name:<10}", "bold"), fact)


def rules_table(found: Explanation) -> Table:
    """Every rule that is on; those that are off are counted below."""
    num_off = sum(rule.verdict == "off" for rule in found.rules)
    table = Table(
        title="Rules, in their order",
        title_justify="left",
        caption=f"{num_off} more are off",
        caption_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("reason to drop", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("asked", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("the value is", overflow="fold")
    for rule in found.rules:
        if rule.verdict != "off":
            table.add_row(
                Text(rule.reason, "bold red" if rule.is_reason else ""),
                shown(rule.value),
                Text(f"{rule.asks} {shown(rule.bound)}"),
                Text(f"{rule.verdict}{', the reason' if rule.is_reason else ''}", STYLES[rule.verdict]),
                Text(rule.formula),
            )
    return table


def signals_table(found: Explanation) -> Table:
    """All signals, two a row."""
    table = Table(title="Signals", title_justify="left", show_header=False, box=box.SIMPLE)
    for _ in range(2):
        table.add_column(overflow="fold")
        table.add_column(justify="right")
    cells = [
        (name, shown(value)) for name, value in found.signals.items() if not name.startswith(SHOWN_BELOW)
    ]
    half = (len(cells) + 1) // 2
    for at in range(half):
        right = cells[half + at] if half + at < len(cells) else ("", "")
        table.add_row(*map(Text, (*cells[at], *right)))
    return table


def rest(found: Explanation) -> Iterator[Text]:
    """Duplicates, what was cut out and masked, and the text."""
    for cluster in found.clusters:
        yield from _cluster_lines(cluster, found)
    if not found.clusters:
        yield Text("No other document was found to be a duplicate of it, nor it of another.")
    for name, counts in (("cut out", found.edits), ("masked", found.pii)):
        if counts:
            yield Text.assemble((f"{name:<10}", "bold"), _listed(counts))
    for item in found.evaluation_items:
        shares = f"{item['ngrams']:,} n-grams of {item['of']:,}"
        yield Text.assemble(("evaluation ", "bold"), f"{shares} of item {item['id']} of {item['set']}")
    if found.text is not None:
        yield Text()
        yield Text(found.text if found.text_is_whole else f"{found.text}…")


def _cluster_lines(cluster: Cluster, found: Explanation) -> Iterator[Text]:
    survivor = cluster.survivor
    stays = "this one" if survivor.id == found.id else _named(survivor)
    if survivor.reason and survivor.id != found.id:
        stays += f", which was dropped later as {words(survivor.reason)}"
    yield Text.assemble(
        (f"{cluster.kind} duplicates: ", "bold"),
        f"{cluster.size:,} documents in the cluster; of them stays {stays}",
    )
    for other in cluster.others:
        yield Text(f"  {_named(other)}")
    unnamed = cluster.size - len(cluster.others) - len({found.id, cluster.survivor.id})
    if unnamed > 0:
        yield Text(f"  and {unnamed:,} more")


def _named(relative: Relative) -> str:
    if relative.record is None:
        return f"{relative.id} ({relative.verdict})"
    return f"{relative.id} ({relative.path}, record {relative.record:,})"


def _language(found: Explanation) -> str | None:
    language, score = found.signals.get("language"), found.signals.get("language_score")
    return f"{language}, score {shown(score)}" if language else None


def _listed(counts: Mapping[str, object] | None) -> str:
    return ", ".join(f"{words(key)} {shown(count)}" for key, count in (counts or {}).items())


def words(name: str) -> str:
    """A name of the code as people write it."""
    return name.replace("_", " ")


def shown(value: object) -> str:
    """A number as people read it."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {name}" for name, count in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    is_whole = isinstance(value, int) or value.is_integer()
    return f"{value:,.0f}" if is_whole else f"{value:.4g}"

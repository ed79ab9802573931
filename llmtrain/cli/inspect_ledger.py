"""`llmtrain inspect ledger`: whether a run, with all its restarts, took every row of its order once."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from llmtrain.cli.compose import run_verb
from llmtrain.cli.past_step import past_run
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import ConfigError
from llmtrain.loader.ledger import LEDGER_NAME, Ledger, contradictions, read_ledger
from llmtrain.progress import progress


@dataclass(kw_only=True)
class InspectLedgerConfig:
    run: str
    """The run folder."""
    recompute: bool = False
    """Whether the data is read again and its hashes compared with those that were noted."""
    last: int | None = None
    """With recompute: only so many of the newest steps."""
    format: OutputFormat = OutputFormat.text

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ConfigError(f"last={self.last} must be at least 1, or null for all steps")


def main() -> None:
    run_verb("inspect_ledger", InspectLedgerConfig, show)


def show(cfg: InspectLedgerConfig) -> None:
    """Print the attempts and what they prove; exit status 1 at a contradiction."""
    folder = Path(cfg.run)
    past = past_run(folder) if cfg.recompute else None
    ledger = read_ledger(folder / LEDGER_NAME) if past is None else past.ledger
    problems = list(contradictions(ledger))
    chain = ledger.surviving()
    num_recomputed = 0
    if past is not None:
        steps = past.of_this_data(chain[-cfg.last :] if cfg.last else chain)
        quiet = cfg.format is OutputFormat.json
        with progress("recompute", total=len(steps), unit="steps", quiet=quiet) as advance:
            for problem in past.other_tokens(steps):
                problems += [problem] if problem else []
                num_recomputed += 1
                advance(1)
    if cfg.format is OutputFormat.json:
        told = {
            "attempts": [asdict(attempt) for attempt in ledger.attempts],
            "num_steps": len(chain),
            "num_rows": chain[-1].last + 1 - ledger.skipped_rows() if chain else 0,
            "num_skipped_rows": ledger.skipped_rows(),
            "withheld_steps": [step.step for step in chain if step.withheld],
            "num_done_again": len(ledger.steps) - len(chain),
            "num_torn": ledger.num_torn,
            "num_recomputed": num_recomputed,
            "problems": problems,
        }
        print(json.dumps(told, indent=1))
    else:
        console = Console(highlight=False)
        console.print(attempts_table(ledger))
        for line in [*problems, *summary(ledger, num_recomputed, problems)]:
            console.print(line, soft_wrap=True, markup=False)
    if problems:
        sys.exit(1)


def attempts_table(ledger: Ledger) -> Table:
    """A line for each attempt, and for each part of one that a rollback began: 3.1 after the first of the
    third."""
    table = Table(box=box.SIMPLE)
    for heading in ("attempt", "ranks", "micro", "after step", "row", "steps", "rows a step"):
        table.add_column(heading, justify="right")
    table.add_column("data", no_wrap=True)
    for attempt in ledger.attempts:
        own = (attempt.attempt, attempt.part)
        done = sum((step.attempt, step.part) == own for step in ledger.steps)
        name = f"{attempt.attempt}.{attempt.part}" if attempt.part else str(attempt.attempt)
        table.add_row(
            *(name, str(attempt.world_size), str(attempt.micro_batch_rows)),
            *(f"{attempt.step:,}", f"{attempt.position:,}", f"{done:,}"),
            ", ".join(map(str, attempt.sizes)),
            f"{attempt.data_hash[:12]}{', change accepted' if attempt.accepted_change else ''}",
        )
    return table


def summary(ledger: Ledger, num_recomputed: int, problems: list[str]) -> list[str]:
    """What the ledger proves."""
    chain = ledger.surviving()
    again = len(ledger.steps) - len(chain)
    told = []
    if chain and not problems:
        skipped = ledger.skipped_rows()
        but = f", but {skipped:,} that were passed over" if skipped else ""
        told.append(
            f"steps 1 to {chain[-1].step:,} took rows 0 to {chain[-1].last:,}, each once{but}; {again:,} "
            "steps were undone by restarts and rollbacks; on the same rows again they had the same tokens"
        )
        if skipped:
            ranges = ledger.attempts[-1].passed_over.ranges
            told.append(
                "passed over on purpose (skipped_rows.json says why): rows "
                + ", ".join(f"{first:,} to {last:,}" for first, last in ranges)
            )
        if withheld := [step for step in chain if step.withheld]:
            told.append(
                f"{len(withheld):,} steps read their rows and updated nothing: "
                + ", ".join(str(step.step) for step in withheld)
            )
    for attempt in ledger.attempts:
        if attempt.accepted_change:
            told.append(
                f"attempt {attempt.attempt} went on with other data after step {attempt.step:,}, as "
                "data.accept_changed=true asked: rows before and after are not those of one order"
            )
    if ledger.num_torn:
        told.append(
            f"{ledger.num_torn} lines were cut off by a kill; their steps were done again, or never counted"
        )
    if num_recomputed:
        told.append(f"{num_recomputed:,} steps were read again and compared")
    if problems:
        told.append(f"{len(problems)} contradictions")
    return told

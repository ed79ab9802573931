"""`llmtrain bench TOPIC [out=FILE]`: a table of figures and a file of rows; alone, the list of topics."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from llmtrain.bench.table import BenchConfig, run_topic, table_of, topics
from llmtrain.cli.compose import run_verb


def with_topic_named(arguments: Sequence[str]) -> list[str]:
    """Turn a first argument that is a bare word into `topic=word`, which Hydra understands."""
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        return [f"topic={arguments[0]}", *arguments[1:]]
    return list(arguments)


def bench(config: BenchConfig) -> None:
    if config.topic is None:
        known = topics()
        width = max((len(name) for name in known), default=0)
        print("usage: llmtrain bench TOPIC [out=FILE] [scale=1.0] [+options.NAME=VALUE]\n")
        print("\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in known.items()))
        return
    rows = run_topic(config)
    Console().print(table_of(rows, title=f"bench {config.topic}"))
    if config.out is not None:
        print(f"rows: {config.out}")


def main() -> None:
    sys.argv[1:] = with_topic_named(sys.argv[1:])
    run_verb("bench", BenchConfig, bench)

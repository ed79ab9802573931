"""`llmtrain data train-quality`: a classifier of good documents, for content.quality.model."""

from __future__ import annotations

from llmtrain.cli.compose import run_verb
from llmtrain.data.content.config import TrainQualityConfig
from llmtrain.data.content.quality import train


def main() -> None:
    run_verb("data_train_quality", TrainQualityConfig, fit)


def fit(cfg: TrainQualityConfig) -> None:
    facts = train(cfg)
    for side in ("positives", "negatives"):
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in facts[side].items())
        print(f"{side:<10} {counts}")
    print("held out   " + ", ".join(f"{name} {value:.4g}" for name, value in facts["held_out"].items()))
    print(f"written    {cfg.out}")
    print(f"next       llmtrain data content.quality.model={cfg.out} rules.min_quality=SCORE")

"""From a compute budget to what to train, and how. numpy only.

`from llmtrain.planner import predict` is the stable entry point for others: see prediction.py.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrain.planner.prediction import Prediction, predict, predict_many

__all__ = ["Prediction", "predict", "predict_many"]


def __getattr__(name: str) -> object:
    """The names above, found when they are first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmtrain.planner import prediction  # noqa: PLC0415  config.py of this package loads without numpy

    found: object = getattr(prediction, name)
    return found

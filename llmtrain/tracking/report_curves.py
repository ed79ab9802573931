"""The curves of the report: the loss, and the smaller ones below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmtrain.tracking.charts import Chart, Mark, Series, number, smoothed, svg
from llmtrain.tracking.run_data import RunData, as_number, median_of, present_values, values_of
from llmtrain.units import format_count, format_duration

SMOOTHING_SHARE = 30
MIN_SMOOTHED_STEPS = 5
"""The bold loss is a mean over the last 1/30 of the run's steps, and over no fewer than these."""
MIN_STEPS_TO_CUT = 100
CUT_SHARE = 15
"""The loss picture begins at the height that the curve has after 1/15 of the steps; the fall before it is
cut."""
SMALL_CHART_POINTS = 150


@dataclass(frozen=True, kw_only=True)
class SmallChart:
    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A field of step records, and how to draw it."""

    title: str
    field: str
    y_unit: str
    note: str
    scale: float = 1.0
    from_zero: bool = True
    log_y: bool = False
    format_y: Callable[[float], str] | None = None


def loss_chart(run: RunData) -> Markup:
    """Training and held-out loss over steps, with what was undone and where the run was resumed."""
    steps, evals = run.of_kind("step"), run.of_kind("eval")
    xs = [record["step"] for record in steps]
    losses, held_out = values_of(steps, "loss"), values_of(evals, "eval_loss")
    calm = smoothed(losses, smoothed_steps(run))
    series = [Series(xs=xs, ys=losses, style="faint-train")]
    for attempt in sorted({record["attempt"] for record in run.undone}):
        lost = [record for record in run.undone if record["attempt"] == attempt]
        series.append(
            Series(xs=[record["step"] for record in lost], ys=values_of(lost, "loss"), style="undone")
        )
    series.append(Series(xs=xs, ys=calm, style="train", label=_end_label("train", calm)))
    series.append(
        Series(
            xs=[record["step"] for record in evals],
            ys=held_out,
            style="held-out",
            label=_end_label("held-out", held_out),
            has_points=True,
        )
    )
    return Markup(
        svg(
            Chart(
                series=series,
                y_unit="nats per token",
                width=800,
                height=430,
                y_high=_height_after_the_first_fall(calm, held_out),
                marks=resume_marks(run),
                right=110,
                second_x=_tokens_at(run),
                second_x_unit="tokens",
            )
        )
    )


def smoothed_steps(run: RunData) -> int:
    """Over how many steps the bold loss is a mean."""
    return max(MIN_SMOOTHED_STEPS, len(run.of_kind("step")) // SMOOTHING_SHARE)


def small_charts(run: RunData) -> list[SmallChart]:
    """Every smaller curve that has values."""
    steps = run.of_kind("step")
    xs = [record["step"] for record in steps]
    marks = [Mark(x=mark.x, label="") for mark in resume_marks(run)]
    drawn = []
    for curve in _curves(run):
        ys = [None if y is None else y * curve.scale for y in values_of(steps, curve.field)]
        chart = Chart(
            series=[Series(xs=xs, ys=ys, style="train", has_band=True)],
            y_unit=curve.y_unit,
            marks=marks,
            log_y=curve.log_y,
            from_zero=curve.from_zero,
            format_y=curve.format_y,
            max_points=SMALL_CHART_POINTS,
        )
        drawn.append(SmallChart(title=curve.title, note=curve.note, svg=Markup(svg(chart))))
    return [chart for chart in drawn if chart.svg]


def _curves(run: RunData) -> list[Curve]:
    steps, settled = run.of_kind("step"), run.settled()
    rate, wait_s = median_of(settled, "tokens_per_s"), median_of(settled, "data_wait_s")
    step_s, peak_tflops = median_of(settled, "step_s"), as_number(run.setting("train", "device_peak_tflops"))
    largest = {name: max(present_values(steps, name), default=0.0) for name in ("lr", "grad_norm", "mem_gib")}
    throughput = Curve(
        title="Throughput",
        field="tokens_per_s",
        y_unit="tokens per second",
        note=f"median {format_count(rate)}" if rate is not None else "",
    )
    # Beside the throughput the step time is the same curve turned over, so it gives way to the utilization.
    utilization_or_time = (
        Curve(
            title="Model FLOPs utilization",
            field="mfu",
            y_unit="share of the devices' peak",
            note=f"of {peak_tflops:g} TFLOP/s" if peak_tflops is not None else "",
            format_y=lambda share: f"{share:.3g}%",
            scale=100.0,
        )
        if present_values(steps, "mfu")
        else Curve(
            title="Step time",
            field="step_s",
            y_unit="milliseconds",
            note=f"median {format_duration(step_s)}" if step_s is not None else "",
            scale=1e3,
        )
    )
    wait = Curve(
        title="Waiting for data",
        field="data_wait_s",
        y_unit="milliseconds per step",
        note=f"median {wait_s * 1e3:.2g} ms" if wait_s is not None else "",
        scale=1e3,
    )
    lr = Curve(title="Learning rate", field="lr", y_unit="no unit", note=f"peak {largest['lr']:.3g}")
    norm = Curve(
        title="Gradient norm",
        field="grad_norm",
        y_unit="L2 before clipping, log scale",
        note=f"largest {largest['grad_norm']:.3g}",
        from_zero=False,
        log_y=True,
    )
    memory = Curve(
        title="Memory",
        field="mem_gib",
        y_unit="GiB, peak of rank 0",
        note=f"peak {largest['mem_gib']:.3g} GiB",
    )
    return [throughput, utilization_or_time, wait, lr, norm, memory]


def resume_marks(run: RunData) -> list[Mark]:
    """A mark where each later attempt went on."""
    return [
        Mark(x=attempt.begin_step, label="resumed" if before.ending is not None else "killed, resumed")
        for before, attempt in zip(run.attempts, run.attempts[1:], strict=False)
    ]


def _end_label(name: str, ys: Sequence[float | None]) -> str:
    last = next((y for y in reversed(ys) if y is not None), None)
    return f"{name} {last:.3f}" if last is not None else name


def _height_after_the_first_fall(
    calm: Sequence[float | None], held_out: Sequence[float | None]
) -> float | None:
    """Where the loss picture's axis may end, so that the fall of the first steps does not flatten all the
    rest."""
    if len(calm) < MIN_STEPS_TO_CUT:
        return None
    shown = [*calm[len(calm) // CUT_SHARE :], *held_out]
    return max((y for y in shown if y is not None), default=None)


def _tokens_at(run: RunData) -> Callable[[float], str] | None:
    """The tokens seen by a step, as text; None when no record says."""
    known = [record for record in run.of_kind("step") if as_number(record.get("tokens")) is not None]
    if not known:
        return None
    tokens_per_step = known[-1]["tokens"] / known[-1]["step"]
    return lambda step: number(float(f"{step * tokens_per_step:.3g}"))

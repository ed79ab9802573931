"""report.html: what it says of a run, whole or not, and that it needs nothing but itself."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest
import yaml

from llmtrain.data.manifest import FORMAT_VERSION, Manifest, PackEntry, TokenizerEntry, write_manifest
from llmtrain.errors import DataError
from llmtrain.planner.interval import Interval
from llmtrain.tracking.facts import record_start
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.tracking.report import render, write_report
from llmtrain.tracking.report_tables import attempt_row, comparison
from llmtrain.tracking.run_data import read_run

FUNNEL = [
    {
        "pass": "scan",
        "in": {"documents": 100, "bytes": 1_000_000},
        "kept": {"documents": 98, "bytes": 900_000},
        "dropped": {
            "invalid_utf8": {"documents": 2, "bytes": 60_000},
            "normalised_away": {"documents": 0, "bytes": 40_000},
        },
    },
    {
        "pass": "decide",
        "in": {"documents": 98, "bytes": 900_000},
        "kept": {"documents": 60, "bytes": 500_000},
        "dropped": {"exact_duplicate": {"documents": 38, "bytes": 400_000}},
        "splits": {"held_out": {"documents": 4, "bytes": 30_000}},
    },
    {
        "pass": "tokenize",
        "in": {"documents": 60, "bytes": 500_000},
        "kept": {"documents": 60, "bytes": 500_000, "tokens": 123_000},
        "dropped": {},
    },
    {
        "pass": "pack train seq_len=64",
        "in": {"tokens": 120_000},
        "kept": {"tokens": 119_940},
        "dropped": {"first_of_document": {"tokens": 60}},
    },
]


class Page(HTMLParser):
    """The visible words of a page, and every address in it."""

    def __init__(self, text):
        super().__init__()
        self.words, self.addresses, self.hidden = [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.hidden += tag == "style"
        named = ("src", "href", "xlink:href", "action", "data")
        self.addresses += [value for name, value in attributes if name in named]

    def handle_endtag(self, tag):
        self.hidden -= tag == "style"

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def write_steps(path, attempt, begin, end, *, what, ending=None, **fields):
    with MetricsFile(path, attempt=attempt) as metrics:
        metrics.write("event", begin, what=what, time=1e9 + begin)
        for step in range(begin + 1, end + 1):
            values = {
                "tokens": step * 630,
                "position": step * 10,
                "loss": 3 + 4 / step,
                "grad_norm": 0.5 if step % 4 else 1.5,
                "lr": 1e-3,
                "tokens_per_s": 6400.0,
                "step_s": 0.1,
                "data_wait_s": 0.001,
                "mem_gib": 1.25,
                "mfu": 0.31,
                "num_valid": 630,
                "time": 1e9 + step,
            }
            metrics.write("step", step, **{**values, **fields})
        if ending:
            metrics.write("event", end, time=1e9 + end, **ending)


@pytest.fixture
def folder(tmp_path):
    """A run that was killed once, resumed, and finished; evaluated; with two samples and a funnel."""
    run, data = tmp_path / "runs" / "demo", tmp_path / "data"
    run.mkdir(parents=True)
    write_steps(run / "metrics.jsonl", 1, 0, 130, what="start")
    write_steps(run / "metrics.jsonl", 2, 120, 200, what="resume", ending={"what": "finished"})
    with MetricsFile(run / "metrics.jsonl", attempt=2) as metrics:
        metrics.write("eval", 200, eval_loss=3.1, eval_s=1.0, time=1e9 + 201)
    for attempt in (1, 2):
        record_start(run, attempt=attempt, command_line=["llmtrain", "train", f"seed={attempt}"])
    config = {
        "run": {"name": "demo", "folder": str(run), "plan": None},
        "data": {"folder": str(data), "seq_len": 64},
        "model": {
            "vocab_size": 512,
            "num_layers": 2,
            "d_model": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_width": 128,
        },
        "train": {
            "total_tokens": 128_000,
            "global_batch_rows": 10,
            "micro_batch_rows": 5,
            "precision": "fp32",
            "grad_clip": 1.0,
            "device_peak_tflops": 0.2,
            "device_peak_source": "measured",
        },
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    figures = {
        "held_out_loss": 2.5,
        "perplexity": 12.18,
        "bits_per_byte": 1.5,
        "gzip_bits_per_byte": 2.0,
        "xz_bits_per_byte": 1.6,
        "num_targets": 3000,
        "text_bytes": 30_000,
        "step": 200,
    }
    (run / "evaluation.json").write_text(json.dumps(figures))
    samples = [
        {"prompt": "Return the", "text": " <b>sum</b> & more", "temperature": 0.8, "top_k": 40, "step": 200},
        {"prompt": "This", "text": "This again", "temperature": 0, "step": 200},
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    packs = [
        PackEntry(
            path="packs/x/seq64",
            split="train",
            seq_len=64,
            strategy="concat",
            num_rows=1000,
            num_target_tokens=60_000,
            num_padding=0,
            num_cut_documents=3,
            num_long_documents=1,
            rows_sha256="0",
            spans_sha256="0",
        )
    ]
    tokenizer = TokenizerEntry(
        path="tokenizer/x", kind="sentencepiece_bpe", vocab_size=512, fingerprint="0", eos_id=2, bos_id=None
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus="tiny",
        dtype="uint16",
        tokenizer=tokenizer,
        shards=[],
        packs=packs,
        funnel=FUNNEL,
        config={},
        config_hash="",
        versions={},
        held_out_text="held_out.jsonl.zst",
        tool_version="0",
    )
    data.mkdir()
    write_manifest(data, manifest)
    return run


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_is_one_file_that_asks_for_no_other(folder):
    path = write_report(folder)
    text = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert Page(text).addresses == []
    assert not re.search(r"https?://|@import|url\(|<script|<link|<img|<iframe", text)


def test_the_head_says_what_came_out(folder):
    text = page_of(folder).text
    assert "finished at step 200" in text
    assert "200 steps over 126k tokens. The model needs 1.500 bits for a byte of held-out text: " in text
    assert "25% fewer than gzip −9 and 6% fewer than xz −9." in text
    assert "2.500 nats/token perplexity 12.18" in text
    assert "gzip 2.000 · xz 1.600" in text
    assert "1 resume, 10 steps redone" in text


def test_findings_are_what_the_records_say(folder):
    text = page_of(folder).text
    assert "Predicts held-out text better than gzip and xz." in text
    assert "Held-out loss is 0.080 above the training loss of the last 10 steps." in text
    assert "The run went over its training text 2 times." in text
    assert "Waiting for data took 1.00% of the step time." in text
    assert "Gradients were clipped, with a norm above 1, in 25% of the steps." in text
    assert "10 steps (5.0%) were undone by a kill and done again; losses equal to the last bit." in text


def test_the_funnel_closes_and_names_every_reason(folder):
    text = page_of(folder).text
    for row in (
        "read 100.0% 977 KiB 100 –",
        "scan: invalid utf8 6.0% 58.6 KiB 2 –",
        "scan: normalised away 4.0% 39.1 KiB 0 –",
        "decide: exact duplicate 40.0% 391 KiB 38 –",
        "kept 50.0% 488 KiB 60 123k",
    ):
        assert row in text
    assert "Held-out: 4 documents, 29.3 KiB." in text
    assert "Pack train seq_len=64: 120k tokens, 100.0% of them targets." in text


def test_bars_of_the_funnel_hang_together(folder):
    run = read_run(folder)
    html = render(run)
    rails = re.findall(r'fill dropped" style="left:([\d.]+)%;width:([\d.]+)%', html)
    edges = [(float(left), float(left) + float(width)) for left, width in rails]
    assert edges[0][1] == pytest.approx(100, abs=0.01)
    assert all(before[0] == pytest.approx(after[1], abs=0.01) for before, after in itertools.pairwise(edges))
    assert edges[-1][0] == pytest.approx(50, abs=0.01)


def test_curves_have_units_and_resumes_are_marked(folder):
    text = page_of(folder).text
    for words in (
        "nats per token",
        "tokens per second",
        "share of the devices' peak",
        "milliseconds per step",
        "GiB, peak of rank 0",
        "L2 before clipping, log scale",
        "killed, resumed",
        "of 0.2 TFLOP/s",
    ):
        assert words in text


def test_samples_are_shown_as_text_and_never_as_markup(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<b>sum</b>" not in html
    assert "Return the <b>sum</b> & more" in Page(html).text
    assert "This  again" in " ".join(Page(html).words).replace("This This", "doubled")
    assert "temperature 0.8 · top-k 40 · step 200" in Page(html).text


def test_attempts_config_and_versions_are_there(folder):
    text = page_of(folder).text
    assert "llmtrain train seed=1" in text
    assert "120 → 200" in text
    assert "0 → 130" in text
    assert "num_kv_heads: 2" in text
    assert "0.2 TFLOP/s, measured" in text


def test_without_a_plan_that_is_said(folder):
    assert "No plan was given." in page_of(folder).text


def test_a_plan_that_is_missing_is_said(folder):
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("plan: null", "plan: gone.plan.json"))
    assert (
        "The plan gone.plan.json cannot be held against this run: no plan at gone.plan.json"
        in page_of(folder).text
    )


def test_a_plan_is_held_against_the_run(folder):
    from llmtrain.planner import config  # noqa: PLC0415  only this test plans
    from llmtrain.planner.cost.cluster import find_cluster  # noqa: PLC0415
    from llmtrain.planner.make import make_plan  # noqa: PLC0415
    from llmtrain.planner.plan import write_plan  # noqa: PLC0415

    planned = make_plan(
        name="demo",
        budget=config.BudgetConfig(days="6min"),
        model=config.ModelWishConfig(vocab_size=512),
        data=config.DataWishConfig(seq_len=64),
        inference=config.InferenceConfig(),
        choice=config.ChoiceConfig(),
        cluster=find_cluster("this_machine", gpus_per_node=2, peak_tflops=0.2),
    )
    write_plan(folder / "demo.plan.json", planned.plan)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("plan: null", f"plan: {folder / 'demo.plan.json'}"))
    text = page_of(folder).text
    assert "No plan was given." not in text
    for name in ("Step time", "Time of all steps", "Peak memory", "Held-out loss"):
        assert name in text
    assert "Plan demo on this_machine" in text


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [(1.0, "inside"), (2.0, "inside"), (0.8, "20% below"), (2.5, "25% above"), (7.0, "3.5 times above"),
     (0.25, "4 times below"), (None, "not measured")],
)  # fmt: skip
def test_a_measured_value_is_held_against_its_interval(measured, verdict):
    row = comparison("x", "median", Interval(low=1.0, mid=1.5, high=2.0), measured, str)
    assert row.verdict == verdict
    assert 0 < row.low < row.mid < row.high < 1
    assert row.at is None or 0 < row.at < 1


def test_losses_that_differ_when_done_again_are_a_warning(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", 1, 0, 5, what="start")
    write_steps(tmp_path / "metrics.jsonl", 2, 3, 6, what="resume", loss=3.5)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert (
        "2 steps (33.3%) were undone by a kill and done again; losses differ by up to 0.5." in Page(html).text
    )
    assert re.search(r'<li class="warn">2 steps', html)


@pytest.mark.parametrize(
    "command",
    [
        "llmtrain train x=1",
        "/venv/bin/python3 /venv/bin/llmtrain train x=1",
        "python3.11 -m llmtrain.cli.main train x=1",
    ],
)
def test_commands_are_shown_as_they_are_typed(tmp_path, command):
    write_steps(tmp_path / "metrics.jsonl", 1, 0, 1, what="start")
    record_start(tmp_path, attempt=1, command_line=command.split())
    run = read_run(tmp_path)
    assert attempt_row(run, run.attempts[0])["command"] == "llmtrain train x=1"


# --- runs that are not whole ---


def test_a_run_with_nothing_but_metrics_says_what_is_missing(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", 1, 0, 3, what="start")
    text = page_of(tmp_path).text
    assert "no end recorded: killed or still running, at step 3" in text
    for missing in (
        f"llmtrain evaluate checkpoint={tmp_path} writes evaluation.json",
        f'llmtrain generate checkpoint={tmp_path} prompt="..." adds to samples.jsonl',
        "The run's config names no data folder.",
        "No plan was given.",
        "The run folder holds no config.yaml.",
        "The run folder holds no run.json.",
        "not evaluated yet",
    ):
        assert missing in re.sub(r"\s+", " ", text).replace(" writes", " writes")


def test_a_run_killed_before_its_first_step_has_a_page(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", 1, 0, 0, what="start")
    text = page_of(tmp_path).text
    assert "No step was finished." in text
    assert "No step has a loss yet." in text


def test_an_empty_metrics_file_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "nothing recorded yet" in page_of(tmp_path).text


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ({"what": "stopped", "signal": "SIGTERM"}, "stopped by SIGTERM after step 5"),
        ({"what": "diverged"}, "diverged at step 5"),
        ({"what": "failed", "error": "OSError: disk full"}, "failed at step 5: OSError: disk full"),
    ],
)
def test_how_a_run_ended_is_the_first_thing_said(tmp_path, ending, words):
    write_steps(tmp_path / "metrics.jsonl", 1, 0, 5, what="start", ending=ending)
    assert words in page_of(tmp_path).text


def test_losses_that_are_not_finite_are_a_gap_and_a_finding(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", 1, 0, 5, what="start", loss=float("nan"), mfu=None)
    text = page_of(tmp_path).text
    assert "The loss was not finite in 5 steps, first 1." in text
    assert "no device peak, so no MFU" in text
    assert "Step time" in text


def test_a_model_worse_than_gzip_is_said_to_be(folder):
    figures = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**figures, "bits_per_byte": 1.8}))
    text = page_of(folder).text
    assert "Predicts held-out text better than gzip, not yet better than xz." in text
    (folder / "evaluation.json").write_text(json.dumps({**figures, "bits_per_byte": 2.5}))
    assert "Predicts held-out text not yet better than gzip and xz." in page_of(folder).text


def test_what_wandb_could_not_do_is_said(folder):
    with MetricsFile(folder / "metrics.jsonl", attempt=2) as metrics:
        metrics.write("event", 200, what="wandb", text="online does not work (HTTP 500); not sent")
        metrics.write("event", 200, what="wandb", text="offline, run x of project p")
    text = page_of(folder).text
    assert "W&B: online does not work (HTTP 500); not sent." in text
    assert "of project p" not in text


def test_damaged_side_files_are_warned_about_and_left_out(folder, caplog):
    (folder / "evaluation.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    (folder / "samples.jsonl").write_text('{"prompt": 1}\n[]\nnot json\n')
    text = page_of(folder).text
    assert "not evaluated yet" in text
    for words in (
        "evaluation.json is not JSON",
        "config.yaml is not YAML",
        "samples.jsonl:3 is not a sample; skipped",
    ):
        assert words in caplog.text


def test_a_data_folder_is_found_from_where_the_run_was_started(folder, monkeypatch, tmp_path):
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "data"), "data"))
    facts = json.loads((folder / "run.json").read_text())
    facts["attempts"][0]["working_folder"] = str(tmp_path)
    (folder / "run.json").write_text(json.dumps(facts))
    monkeypatch.chdir("/")
    assert "decide: exact duplicate" in page_of(folder).text


def test_a_data_folder_that_is_gone_is_said(folder, tmp_path):
    shutil.rmtree(tmp_path / "data")
    assert "llmtrain data" in page_of(folder).text


def test_no_such_run_names_the_runs_there_are(folder):
    with pytest.raises(DataError, match=r"no run folder .*dmeo; runs in .*runs: demo"):
        write_report(folder.with_name("dmeo"))


def test_no_run_at_all_says_what_makes_one(tmp_path):
    with pytest.raises(DataError, match=r"no run folder .*; `llmtrain train` makes one; give its folder"):
        write_report(tmp_path / "x" / "y")


def test_a_folder_without_metrics_says_that_no_training_has_begun(tmp_path):
    with pytest.raises(
        DataError, match=r"holds no metrics.jsonl, so no training has begun there; `llmtrain train`"
    ):
        write_report(tmp_path)


def test_a_long_run_makes_a_small_page_in_short_time(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", 1, 0, 20_000, what="start", ending={"what": "finished"})
    begin = time.monotonic()
    path = write_report(tmp_path)
    assert time.monotonic() - begin < 5
    assert path.stat().st_size < 300_000


def test_a_browser_draws_the_page(folder, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    picture = tmp_path / "report.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking"]
    command += ["--window-size=1400,900", f"--screenshot={picture}", write_report(folder).as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert picture.stat().st_size > 20_000

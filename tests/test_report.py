"""The summary against figures worked out by hand, and the table, plots and refusals of a results
folder.
"""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from common import PLOTS, one_line_error, tiny_llama
from rich.console import Console
from test_decode import WHOLE, drafting

from sdsat.cli.report import report as report_command
from sdsat.config import DecodeConfig, InputError
from sdsat.evaluation.measure import run_record
from sdsat.evaluation.report import WIDTH, markdown_table, report, rich_table, table_rows
from sdsat.evaluation.summary import describe, interval, read_workers, summarize
from sdsat.evaluation.sweep import AR, Setting
from sdsat.files import read_json, write_json

REFERENCES = sorted((Path(__file__).parent.parent / "results/reference").glob("*/*/summary.json"))
SETTINGS = {
    "model": "tiny",
    "dataset": "humaneval",
    "method": "greedy",
    "dtype": "float32",
    "max_new_tokens": 8,
    "tree": "chain",
}


def run(
    strategy,
    k,
    tokens,
    seconds,
    passes,
    proposed=(),
    accepted=(),
    histogram=(0,),
    sha="same",
    lookup=0,
    rounded=0,
):
    return {
        "strategy": strategy,
        "k": k,
        "lookup": lookup,
        "prefill_seconds": 0.5,
        "decode_seconds": seconds - 0.5,
        "num_passes": passes,
        "num_plain_passes": 0,
        "num_rounded_passes": rounded,
        "num_new_tokens": tokens,
        "finish": "length",
        "proposed_by_depth": list(proposed),
        "accepted_by_depth": list(accepted),
        "accepted_histogram": list(histogram),
        "outputs_sha256": [sha] if isinstance(sha, str) else sha,
    }


def document(problems, device="cpu"):
    return {
        "schema_version": 4,
        "device": device,
        "environment": {"device_name": "test CPU"},
        "settings": SETTINGS,
        "problems": [
            {"task_id": f"{device}/{i}", "num_prompt_tokens": 3, "runs": runs}
            for i, runs in enumerate(problems)
        ],
    }


@pytest.fixture
def documents():
    # 8 tokens a problem. Problem 0: two loops, 2 and 1 drafts accepted of 2. Problem 1: 0, 1 and 2,
    # and another output.
    first = [run("ar", 0, 8, 4.0, 8), run("two-step", 2, 8, 2.0, 4, (2, 2), (2, 1), (0, 1, 1))]
    second = [
        run("ar", 0, 8, 6.0, 8),
        run("two-step", 2, 8, 3.0, 6, (3, 3), (2, 1), (1, 1, 1), sha="other"),
    ]
    return [document([first]), document([second], "1")]


def test_summary_by_hand(documents):
    summary = summarize(documents)
    ar, drafted = summary["runs"]
    assert (ar["strategy"], ar["k"], ar["speedup"], ar["acceptance_rate"]) == ("ar", 0, 1.0, None)
    assert ar["tokens_per_second"] == pytest.approx(16 / 10)
    assert (drafted["strategy"], drafted["k"], drafted["num_problems"]) == ("two-step", 2, 2)
    assert drafted["speedup"] == pytest.approx(2.0)
    # both problems: exactly twice as fast
    assert drafted["speedup_ci95"] == pytest.approx([2.0, 2.0])
    assert drafted["acceptance_by_depth"] == pytest.approx([4 / 5, 2 / 5])
    assert drafted["acceptance_rate"] == pytest.approx(6 / 10)
    assert drafted["accepted_per_loop"] == pytest.approx(6 / 5)
    # five of ten passes verified nothing: a token each
    assert drafted["mean_accepted_tokens"] == pytest.approx((16 - 5) / 5)
    assert ar["mean_accepted_tokens"] is None  # it verifies nothing
    assert drafted["tokens_per_pass"] == pytest.approx(16 / 10)
    assert drafted["accepted_histogram"] == [1, 2, 2]
    assert drafted["identical_outputs"] == 1
    assert (ar["seconds_per_problem"], drafted["seconds_per_problem"]) == (5.0, 2.5)
    assert drafted["seconds_per_problem_ci95"] == pytest.approx([2, 3], rel=1e-3)
    # half a second of each problem was the prompt's
    assert drafted["seconds_per_pass"] == pytest.approx(4 / 10)
    low, high = drafted["tokens_per_second_ci95"]
    # two problems: the extremes
    assert low == pytest.approx(8 / 3, rel=1e-3) and high == pytest.approx(8 / 2, rel=1e-3)


def test_bands_over_workers_by_hand():
    """Two workers with the same problems: 1.96 standard errors of the mean of their figures."""
    workers = [
        document(
            [
                [
                    run("ar", 0, 8, 4.0, 8),
                    run("two-step", 2, 8, seconds, 4, (2, 2), (2, 1), (0, 1, 1)),
                ]
            ]
        )
        for seconds in (2.0, 1.0)
    ]
    for number, each in enumerate(workers):
        each |= {"device": f"cpu.{number}", "settings": {**SETTINGS, "repeat": True}}
    lone = document(
        [[run("ar", 0, 8, 4.0, 8), run("two-step", 2, 8, 9.0, 4, (2, 2), (2, 1), (0, 1, 1))]], "1"
    )
    workers[0]["problems"] += lone["problems"]  # which the other has not finished yet
    summary = summarize(workers)
    drafted = summary["runs"][1]
    assert (summary["num_workers"], drafted["num_problems"], drafted["num_new_tokens"]) == (
        2,
        1,
        16,
    )
    # 4 and 8 tokens a second: their standard deviation is 2.828, of their mean 2
    middle = 16 / 3
    assert drafted["tokens_per_second"] == pytest.approx(middle, abs=1e-4)
    assert drafted["tokens_per_second_ci95"] == pytest.approx(
        [middle - 1.96 * 2, middle + 1.96 * 2], abs=1e-4
    )
    assert drafted["seconds_per_problem"] == 1.5
    assert drafted["seconds_per_problem_ci95"] == pytest.approx([1.5 - 0.98, 1.5 + 0.98])
    assert drafted["acceptance_rate_ci95"] == [0.75, 0.75]
    assert "1.96 standard errors over 2 workers" in markdown_table(summary)
    alone = summarize(workers[:1])["runs"][1]
    assert (alone["num_problems"], alone["speedup_ci95"]) == (2, None)


def test_the_fastest_k_of_each_problem_by_hand():
    def problem(*seconds):
        return [
            run("ar", 0, 8, 2.0, 8),
            *(run("two-step", k, 8, at, 4) for k, at in zip((1, 3, 5), seconds, strict=True)),
            run("auto", 5, 8, 0.75, 4),  # which chooses itself
        ]

    summary = summarize([document([problem(2.5, 1.0, 1.25), problem(2.5, 3, 4), problem(1, 1, 2)])])
    assert summary["best_k"] == [
        {"task_id": "cpu/0", "strategy": "two-step", "k": 3, "speedup": 2.0},
        {"task_id": "cpu/1", "strategy": "two-step", "k": 0, "speedup": 1.0},
        {"task_id": "cpu/2", "strategy": "two-step", "k": 1, "speedup": 2.0},
    ]


@pytest.mark.parametrize(
    ("ar", "drafted", "identical"),
    [
        (["a", "a", "a"], ["a", "a", "a"], 1),
        (["a", "a", "a"], ["a", "b", "a"], 0),  # one turn, which needn't be the median one
        (["a", "a", "b"], ["a", "a", "a"], 0),
        (["b", "b", "b"], ["a", "a", "a"], 0),
    ],
)
def test_identical_looks_at_the_outputs_of_every_turn(ar, drafted, identical):
    runs = [
        run("ar", 0, 8, 4.0, 8, sha=ar),
        run("two-step", 2, 8, 2.0, 4, (2, 2), (2, 1), (0, 1, 1), sha=drafted),
    ]
    assert summarize([document([runs])])["runs"][1]["identical_outputs"] == identical


@pytest.mark.parametrize("strategy", ["two-step", "rounded"])
def test_mean_accepted_tokens_are_those_that_a_verify_pass_emits(strategy):
    """As the field has it: with the token that the model adds itself, and without passes that
    verify nothing.

    Drafts that are never right make one token a verify pass, however many tokens other passes make.
    """
    decoder = drafting(tiny_llama(torch.float32, **WHOLE), native=True, k=3, strength=1.0)
    emitted = []
    out = decoder.generate(
        [1, 5, 9],
        DecodeConfig(3, 40, strategy=strategy),
        lambda tokens, _: emitted.append(len(tokens)),
    )
    record = run_record(Setting(strategy, 3, 0), out)
    ar = run_record(AR, decoder.generate([1, 5, 9], DecodeConfig(0, 40)))
    (_, found) = summarize([document([[ar, record]])])["runs"]
    verify = len(out.accepted_lengths)
    # two-step drafts and verifies in turn
    passes = emitted[1 : 2 * verify : 2] if strategy == "two-step" else emitted[:verify]
    assert len(passes) == verify > 5
    assert found["mean_accepted_tokens"] == pytest.approx(sum(passes) / verify, abs=1e-4)
    never = run("two-step", 3, 40, 2.0, 40, (20, 0, 0), (0, 0, 0), (20, 0, 0, 0))
    assert summarize([document([[ar, never]])])["runs"][1]["mean_accepted_tokens"] == 1


def test_figures_say_which_of_them_counts_the_models_own_token(documents):
    summary = summarize(documents)
    for text in (markdown_table(summary), str(rich_table(summary).caption)):
        assert (
            "without the token that the model adds itself" in text
            and "BCa bootstrap over the problems" in text
        )
        assert "made once: loading, warming up, the cost curve of auto, the rounded weights" in text


def test_an_interval_is_scipys():
    """The bootstrap of a mean, asked for directly; where all problems say the same there is nothing
    to draw.
    """
    values = np.array([1.0, 2.0, 2.5, 3.0, 7.0, 11.0])
    want = scipy.stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(5)
    )
    found = interval(np.stack([values, np.ones(6)], 1), lambda sums: sums[..., 0] / sums[..., 1])
    assert found == pytest.approx(list(want.confidence_interval), rel=0.03)
    assert interval(np.ones((6, 2)), lambda sums: sums[..., 0] / sums[..., 1]) == [1.0, 1.0]
    assert interval(np.zeros((6, 2)), lambda sums: sums[..., 0]) == [0.0, 0.0]
    assert interval(np.ones((1, 2)), lambda sums: sums[..., 0]) is None


def test_report_writes_summary_plots_and_table(documents, tmp_path):
    for doc in documents:
        write_json(tmp_path / f"worker_{doc['device']}.json", doc)
    summary = report(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for name in PLOTS:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    assert (
        "| two-step | 2 | 0 | 3.2 | 2.00 [2.00, 2.00] | 0.60 | 1.20 | 2.20 | 1.60 | 1/2 |"
        in markdown_table(summary)
    )


@pytest.mark.usefixtures("sketches")
def test_report_of_a_single_problem_has_no_interval(documents, tmp_path):
    write_json(tmp_path / "worker_cpu.json", documents[0])
    assert report(tmp_path)["runs"][1]["speedup_ci95"] is None


@pytest.mark.usefixtures("sketches")
def test_report_of_a_strategy_that_never_drafted(documents, tmp_path):
    """`auto` may find plain passes best throughout: no acceptance rate, yet all plots."""
    for lookup in (0, 12):
        documents[0]["problems"][0]["runs"].append(
            run("auto", 2, 8, 4.0, 8, (0, 0), (0, 0), (0, 0, 0), lookup=lookup)
        )
    documents[0]["problems"][0]["runs"].append(
        run("lookup", 0, 8, 4.0, 8, (1,), (1,), (0, 1), lookup=12)
    )
    write_json(tmp_path / "worker_cpu.json", documents[0])
    runs = report(tmp_path)["runs"]
    assert [(run["strategy"], run["lookup"]) for run in runs] == [
        ("ar", 0), ("lookup", 12), ("two-step", 0), ("auto", 0), ("auto", 12),
    ]  # fmt: skip
    assert runs[3]["acceptance_rate"] is None
    assert {path.stem for path in tmp_path.glob("*.png")} == PLOTS


HEAD = {"schema_version": 4, "settings": {}, "environment": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a worker document"),
        ("[]", "not a worker document"),
        ("[" * 100_000, "not a worker document"),
        (json.dumps(HEAD), "KeyError.*problems"),
        (json.dumps({**HEAD, "problems": [{"task_id": "a"}]}), "KeyError.*runs"),
        ('{"schema_version": 0, "problems": []}', "schema_version 0, expected 4"),
    ],
)
def test_report_refuses_what_it_cannot_read(content, message, tmp_path):
    (tmp_path / "worker_cpu.json").write_text(content)
    with pytest.raises(InputError, match=message) as refusal:
        report(tmp_path)
    assert "\n" not in str(refusal.value)


# what may be anything: a worker's name, the names in the title, and what no report reads
FREE = ("device", "model", "dataset", "dtype", "max_new_tokens", "tree", "device_name", "finish")


def places(node, above=()):
    """Name all parts of a document, each as the keys that lead to it."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield (*above, key)
        if isinstance(node[key], (dict, list)):
            yield from places(node[key], (*above, key))


def test_a_worker_document_damaged_anywhere_is_refused_in_one_line(documents, tmp_path):
    """Any part of another kind: refused, or none that a report reads."""
    whole = document([problem["runs"] for problem in documents[0]["problems"]])
    refused = 0
    for place in places(whole):
        for wrong in ("x", None, {}, [[1]], -1.5):
            damaged = copy.deepcopy(whole)
            part = damaged
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = wrong
            write_json(tmp_path / "worker_cpu.json", damaged)
            try:
                describe(summarize(read_workers(tmp_path)))
            except InputError as error:
                assert "\n" not in str(error)
                refused += 1
            else:
                assert place[-1] in (*FREE, "num_prompt_tokens") or wrong == "x", (place, wrong)
    assert refused > 150


@pytest.mark.usefixtures("sketches")
def test_workers_of_two_benchmarks_in_a_folder_are_refused(documents, tmp_path):
    first, second = documents
    for other in (  # read first, as worker_1
        {**second, "settings": {**SETTINGS, "model": "another"}},
        {
            **second,
            "problems": [{**second["problems"][0], "runs": second["problems"][0]["runs"][:1]}],
        },
    ):
        for each in (first, other):
            write_json(tmp_path / f"worker_{each['device']}.json", each)
        with one_line_error("of worker cpu are not of the settings and runs of worker 1"):
            report(tmp_path)


def test_report_of_an_empty_or_missing_folder(tmp_path):
    for folder, message in ((tmp_path, "holds no worker"), (tmp_path / "none", "no such folder")):
        with pytest.raises(InputError, match=message):
            report(folder)


def test_a_plot_that_cannot_be_written_is_one_line(documents, tmp_path):
    write_json(tmp_path / "worker_cpu.json", documents[0])
    (tmp_path / "speedup.png").mkdir()
    with one_line_error(f"{tmp_path / 'speedup.png'}: cannot be written"):
        report(tmp_path)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("summary", REFERENCES, ids=lambda path: path.parent.name)
def test_committed_results_are_read_as_they_are(summary):
    assert summarize(read_workers(summary.parent)) == read_json(summary)


def test_failed_write_leaves_the_old_document(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(InputError, match="No space left"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_terminal_shows_all_cells_of_the_table_in_lines_of_their_own(documents):
    """None is cut short, and none but the heads goes over two lines."""
    table = rich_table(summarize(documents))
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    lines = text.getvalue().splitlines()
    assert "…" not in text.getvalue()
    rows = [line for line in lines if line.startswith("│")]
    cells = [tuple(cell.strip() for cell in row.strip("│").split("│")) for row in rows]
    assert cells == table_rows(summarize(documents))


@pytest.mark.usefixtures("sketches")
def test_a_folder_that_is_given_twice_is_refused(documents, tmp_path):
    write_json(tmp_path / "worker_cpu.json", documents[0])
    with one_line_error("is given twice; expected each once"):
        report_command([tmp_path, tmp_path / "../" / tmp_path.name, tmp_path / "none"])

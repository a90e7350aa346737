"""Where measured outputs end, and a worker's last words: everything it prints is in its log, and
the closing line quotes it.
"""

import json
import signal
import string

import pytest
from common import VOCAB, one_line_error, tiny_llama, tiny_tokenizer, with_adapter
from test_decode import CIRCLE, drafting

from sdsat.config import DecodeConfig, InputError, SamplingConfig
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.evaluation import measure, outputs, workers
from sdsat.evaluation.sweep import BenchConfig
from sdsat.tasks.datasets import humaneval_problems
from sdsat.tasks.prompts import HUMANEVAL_STOPS, Problem

DEATHS = {
    "raise RuntimeError('CUDA out of memory')": (1, "RuntimeError: CUDA out of memory"),
    "import os; os.system('echo from native code'); os.abort()": (
        -6,
        "Fatal Python error: Aborted",
    ),
}


def die(log, death):
    workers.log_to(log, "title")
    print("said")
    exec(death)


@pytest.mark.parametrize("death", DEATHS)
def test_a_workers_last_words_are_in_its_log(own_process, tmp_path, death):
    code, trace = DEATHS[death]
    log = tmp_path / "worker_0+1.log"
    log.write_text("of an earlier run\n")
    assert own_process(die, log, death).end() == (code, "", "")
    text = log.read_text()
    assert text.startswith("of an earlier run\n") and "title\n" in text and trace in text
    assert ("from native code" in text) == (code == -6)
    line = workers.obituary("0+1", code, log)
    assert line == f"worker 0+1 (exit code {code}{', ' + trace if code > 0 else ''}; log: {log})"


def test_labels_are_distinct():
    assert workers.labels(["cpu", "0", "cpu", "0+1", "0+1", "cpu"]) == [
        "cpu",
        "0",
        "cpu.1",
        "0+1",
        "0+1.1",
        "cpu.2",
    ]


def test_stop_strings_end_every_output_alike():
    """AR, drafts and transformers' own generate: the token that completes one is the last."""
    decoder = with_adapter(tiny_llama())
    free = decoder.generate([1, 5, 9], DecodeConfig(0, 20)).token_ids
    last = next(
        i
        for i in range(4, 20)
        if len({*free[: i + 1]}) > len({*free[:i]}) and free[i - 1] not in free[: i - 1]
    )
    pieces = [*string.ascii_letters, *string.digits, "?", "!"][:VOCAB]
    pieces[free[last - 1]], pieces[free[last]] = "\n", "#"
    decoder.model.tokenizer = tiny_tokenizer(pieces)
    config = BenchConfig("x", k_list=(0, 3), max_new_tokens=20, with_generate=True)
    entry, kept = measure.measure_problem(
        decoder, Problem("p", (1, 5, 9), stop_strings=HUMANEVAL_STOPS), config, 0
    )
    runs = entry["runs"]
    assert [(run["strategy"], run["num_new_tokens"], run["finish"]) for run in runs] == [
        (strategy, last + 1, "stop_string")
        for strategy in ("transformers", "ar", "two-step", "lookup", "auto", "auto")
    ]
    assert len({sha for run in runs for sha in run["outputs_sha256"]}) == 1
    out = decoder.generate([1, 5, 9], DecodeConfig(0, 20, stop_strings=HUMANEVAL_STOPS))
    assert out.text and {output.text for _, output in kept} == {out.text}


def test_texts_are_kept_with_accepted_drafts_marked():
    """One character a token, so that the marks are the flags that a caller of `generate` gets."""
    decoder = drafting(tiny_llama(**CIRCLE), k=3)
    pieces = [*string.ascii_letters, *"<&>\"'\u00e9\u65e5\U0001f389 \n{}"][:VOCAB]
    decoder.model.tokenizer = tiny_tokenizer(pieces)
    config = BenchConfig("x", k_list=(3,), max_new_tokens=30, with_generate=True)
    _, kept = measure.measure_problem(decoder, Problem("p", (1, 5, 9, 1, 5, 9)), config, 0)
    assert [key for key, _ in kept] == keys_of(config)
    for setting, (_, output) in zip(config.settings, kept, strict=True):
        marks = [False] * len(output.text)
        for first, end in output.accepted:
            marks[first:end] = [True] * (end - first)
        if setting.drafts:
            asked = setting.of(DecodeConfig(0, 30))
            flags = []
            out = decoder.generate(
                [1, 5, 9, 1, 5, 9], asked, lambda _, new, to=flags: to.extend(new)
            )
            assert (output.text, marks) == (out.text, flags)
            assert setting.strategy != "lookup" or sum(marks) > 5
        else:
            assert output.text == kept[1][1].text and not any(marks)
        assert "".join(text for text, _ in output.pieces()) == output.text


def test_lines_that_a_killed_run_left_are_skipped_and_taken_away(tmp_path):
    """It had added a problem's lines, and its document did not name the problem yet."""
    key = ("ar", 0, 0)
    document = {"device": "cpu", "problems": [{"task_id": "a"}]}
    outputs.append_outputs(tmp_path, "cpu", "a", [(key, outputs.Output("\u2028 <\r\n", [[0, 2]]))])
    file = tmp_path / "outputs_cpu.jsonl"
    whole = file.read_text()
    outputs.append_outputs(tmp_path, "cpu", "b", [(key, outputs.Output("not finished", []))])
    outputs.append_outputs(tmp_path, "1", "b", [(key, outputs.Output("of no document", []))])
    with file.open("a") as content:
        content.write('{"task_id": "a", "text": "tor')
    expected = {("a", key): outputs.Output("\u2028 <\r\n", [[0, 2]])}
    assert outputs.read_outputs(tmp_path, document) == expected
    outputs.tidy_outputs(tmp_path, [document])
    assert file.read_text() == whole and not (tmp_path / "outputs_1.jsonl").read_text()
    assert outputs.read_outputs(tmp_path, document) == expected
    assert outputs.read_outputs(tmp_path, {**document, "device": "none"}) == {}
    line = {"task_id": "a", "strategy": "ar", "k": 0, "lookup": 0, "text": "abc", "accepted": []}
    damaged = [
        {"text": None}, {"text": ["a"]}, {"strategy": ["ar"]}, {"accepted": [1]},
        {"accepted": [[0, 99]]}, {"accepted": [[2, 1]]}, {"accepted": [["a", "b"]]},
    ]  # fmt: skip
    for text in ("[]", "[" * 100_000, *(json.dumps(line | each) for each in damaged)):
        file.write_text(text + "\n" + whole)
        with one_line_error(f"{file}: not a worker's outputs"):
            outputs.read_outputs(tmp_path, document)


def test_of_several_turns_the_median_run_is_kept_and_the_outputs_of_all(monkeypatch):
    """They take turns, so that a slow minute of the machine hits all alike."""
    times = {"ar": [9.0, 1.0, 2.0, 3.0], "two-step": [5.0, 8.0, 7.0, 6.0]}
    measured = []

    def scripted(decoder, prompt, config, on_tokens):
        strategy = config.strategy if config.k else "ar"
        measured.append(strategy)
        turn = measured.count(strategy) - 1
        wrong = (strategy, turn) == ("two-step", 1)  # not the median one
        return Generation([8 if wrong else 7], num_passes=1, decode_seconds=times[strategy][turn])

    monkeypatch.setattr(Decoder, "generate", scripted)
    config = BenchConfig("x", k_list=(0, 3), strategies=("two-step",), turns=4)
    entry, _ = measure.measure_problem(with_adapter(tiny_llama()), Problem("p", (1,)), config, 0)
    runs = entry["runs"]
    assert measured == ["ar", "two-step"] * 4
    assert [run["decode_seconds"] for run in runs] == [2.0, 6.0]  # of four the second
    assert [len({*run["outputs_sha256"]}) for run in runs] == [1, 2]
    assert (
        runs[0]["outputs_sha256"][0] == runs[1]["outputs_sha256"][0] != runs[1]["outputs_sha256"][1]
    )
    with pytest.raises(InputError, match="turns=0: expected 1 or more"):
        BenchConfig("x", turns=0)


def keys_of(config):
    """(strategy, k, tokens to look up) of what is measured."""
    return [setting[:3] for setting in config.settings]


def test_auto_is_measured_beside_what_it_is_made_of():
    assert keys_of(BenchConfig("x", k_list=(0, 3, 5))) == [
        ("ar", 0, 0),
        ("two-step", 3, 0),
        ("two-step", 5, 0),
        ("lookup", 0, 12),
        ("auto", 5, 0),
        ("auto", 5, 12),
    ]
    assert keys_of(BenchConfig("x", k_list=(0, 5), strategies=("auto", "lookup"), lookup=4)) == [
        ("ar", 0, 0), ("lookup", 0, 4), ("auto", 5, 0), ("auto", 5, 4),
    ]  # fmt: skip
    assert keys_of(BenchConfig("x", k_list=(0, 5), strategies=("auto",), lookup=0)) == [
        ("ar", 0, 0),
        ("auto", 5, 0),
    ]
    assert keys_of(BenchConfig("x", k_list=(0,), strategies=("lookup",))) == [
        ("ar", 0, 0),
        ("lookup", 0, 12),
    ]
    assert keys_of(BenchConfig("x", k_list=(0,))) == [("ar", 0, 0)]
    for strategies, lookup, message in (
        ("lookup", 0, "lookup=0"),
        ("auto", 33, "lookup=33"),
        ("ar", 12, "strategy=ar"),
    ):
        with pytest.raises(InputError, match=message):
            BenchConfig("x", strategies=(strategies,), lookup=lookup)


def measured_by(monkeypatch, decoder, config, *task_ids):
    """What `measure_problem` runs: (prompt ids, settings) of each run."""
    calls = []
    generate = Decoder.generate

    def kept(decoder, prompt_ids, config, on_tokens):
        calls.append((prompt_ids, config))
        return generate(decoder, prompt_ids, config, on_tokens)

    monkeypatch.setattr(Decoder, "generate", kept)
    records = [
        measure.measure_problem(decoder, Problem(task, (1, 5, 9, 1, 5, 9)), config, 0).entry
        for task in task_ids
    ]
    return calls, records


def test_parts_of_auto_do_what_they_say(monkeypatch):
    """AR is one token a pass; lookup alone has no SATs; auto without lookup looks nothing up."""
    decoder = drafting(tiny_llama(**CIRCLE), k=3)
    calls, (record,) = measured_by(
        monkeypatch, decoder, BenchConfig("x", k_list=(3,), max_new_tokens=30), "p"
    )
    ar, _, lookup, without, both = record["runs"]
    assert (ar["num_passes"], ar["num_plain_passes"], ar["proposed_by_depth"]) == (30, 30, [])
    assert lookup["num_passes"] < 25 and len(lookup["proposed_by_depth"]) == 12
    assert (len(without["proposed_by_depth"]), len(both["proposed_by_depth"])) == (4, 12)
    chosen = [decoder.resolved(config) for _, config in calls]
    assert [(config.k, config.lookup) for config in chosen] == [
        (0, 0),
        (3, 0),
        (0, 12),
        (3, 0),
        (3, 12),
    ]
    assert len({sha for run in record["runs"] for sha in run["outputs_sha256"]}) == 1


def test_problems_are_independent_draws_that_can_be_drawn_again(monkeypatch):
    config = BenchConfig(
        "x",
        method="nucleus",
        k_list=(3,),
        strategies=("two-step",),
        seed=7,
        max_new_tokens=12,
        turns=2,
    )
    calls, (first, second, again) = measured_by(
        monkeypatch, with_adapter(tiny_llama()), config, "p/0", "p/1", "p/0"
    )
    seeds = [config.sampling.seed for _, config in calls]
    assert len({*seeds[:4]}) == len({*seeds[4:8]}) == 1 and seeds[0] == seeds[8] != seeds[4]
    assert [record["seed"] for record in (first, second, again)] == [seeds[0], seeds[4], seeds[0]]
    outputs = [
        {sha for run in record["runs"] for sha in run["outputs_sha256"]}
        for record in (first, second, again)
    ]
    assert len(outputs[0]) == len(outputs[1]) == 1 and outputs[0] == outputs[2] != outputs[1]
    assert (
        SamplingConfig(0.5, seed=1).of_problem("p/0").seed
        != SamplingConfig(0.5, seed=2).of_problem("p/0").seed
    )
    assert SamplingConfig(seed=3).of_problem("p/0").seed == 3  # greedy draws nothing


def test_warming_up_takes_a_prompt_that_is_not_measured(monkeypatch):
    decoder = with_adapter(tiny_llama(vocab=101))
    decoder.model.tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    warmed = []
    monkeypatch.setattr(
        measure,
        "measure_problem",
        lambda decoder, problem, config, first: warmed.append((problem, config)),
    )
    measure.warm_up(decoder, BenchConfig("x", turns=3))
    ((problem, config),) = warmed
    text = decoder.model.tokenizer.decode(problem.prompt_ids)
    assert "seconds_of_day" in text and config.turns == 1
    assert not any(
        p["entry_point"] == "seconds_of_day" or text.strip() in p["prompt"]
        for p in humaneval_problems()
    )


@pytest.mark.parametrize(
    ("held", "then"),
    [(signal.SIG_IGN, signal.SIG_IGN), (signal.default_int_handler, signal.SIG_DFL)],
)
def test_a_worker_ignores_interrupts_where_its_run_does(held, then):
    before = signal.signal(signal.SIGINT, held)
    try:
        workers.heed_interrupts()
        assert signal.getsignal(signal.SIGINT) == then
    finally:
        signal.signal(signal.SIGINT, before)

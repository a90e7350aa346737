"""Sharing: a folder of `sdsat export --hub` is what plain transformers code loads, and adapters
load by hub id. The hub is a server of one folder, and huggingface_hub its real client.
"""

import hashlib
import http.server
import json
import re
import shutil
import sys
import threading
import time

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from common import one_line_error, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdsat
from sdsat.cli import main as cli
from sdsat.config import SatConfig
from sdsat.evaluation.sweep import BenchConfig
from sdsat.interfaces.hub_export import export_to_hub
from sdsat.models import hub, loading
from sdsat.models.identity import adapter_hash

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The tiny adapter in the hub's form; what it was made of is out of reach."""
    place = tmp_path_factory.mktemp("shared")
    shutil.copytree(tiny.parent, place / "made")
    config = place / "made/tiny-sdsat/adapter_config.json"
    text = config.read_text().replace(str(tiny.parent), str(place / "made"))
    config.write_text(text)
    config = place / "made/base/config.json"
    config.write_text(config.read_text().replace("float64", "float32"))
    export_to_hub(str(place / "made/tiny-sdsat"), place / "tiny")
    shutil.rmtree(place / "made")
    return place / "tiny"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """transformers copies the code that it runs to here."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def loaded(place, **options):
    """(model, inputs), as a program loads them that has never heard of this one."""
    at = {name: value for name, value in options.items() if name == "revision"}
    tokenizer = AutoTokenizer.from_pretrained(place, **at)
    model = AutoModelForCausalLM.from_pretrained(place, **options)
    return model, tokenizer(PROMPT, return_tensors="pt")


def test_plain_transformers_code_generates_with_it(folder, modules):
    model, inputs = loaded(folder)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    options = dict(custom_generate=str(folder), trust_remote_code=True, do_sample=False)
    done = model.generate(
        **inputs,
        max_new_tokens=24,
        strategy="two-step",
        return_dict_in_generate=True,
        **options,
    )
    assert torch.equal(done.sequences, plain)
    (generation,) = done.generations
    assert (
        generation.num_passes > generation.num_plain_passes
    )  # it drafted, with the adapter's SATs
    assert model.sdsat.model.sat == SatConfig(model.config.vocab_size, 5)
    assert torch.equal(model.generate(**inputs, max_new_tokens=9, **options), plain[:, :-15])
    ours, tokenizer = sdsat.load(str(folder), "float32", "cpu")  # by its place alone
    output = ours.generate(**inputs, max_new_tokens=24, custom_generate=sdsat.generate)
    assert torch.equal(output, plain) and tokenizer.decode(output[0]).startswith(PROMPT)


def test_a_model_that_is_trusted_when_loaded_needs_no_further_word(folder, modules):
    model, inputs = loaded(folder, trust_remote_code=True)
    again, _ = loaded(folder)
    plain = again.generate(**inputs, max_new_tokens=12, do_sample=False)
    for arguments in ((inputs["input_ids"],), ()):
        settings = {} if arguments else dict(inputs)
        output = model.generate(*arguments, **settings, max_new_tokens=12, do_sample=False)
        assert torch.equal(output, plain)
    assert model.sdsat.model.adapter is not None
    with one_line_error("num_beams=2"):
        model.generate(**inputs, max_new_tokens=12, num_beams=2)


def test_the_cards_python_runs_and_names_no_folder_of_this_machine(folder, modules, capsys):
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    exec(code.replace("PLACE", str(folder)), {})
    assert capsys.readouterr().out.startswith(PROMPT)
    assert "Not measured yet." in card and "k = 5" in card
    texts = [file.read_text() for file in folder.rglob("*") if file.suffix in (".md", ".json")]
    assert not any(str(folder.parent) in text for text in texts)


@pytest.mark.parametrize("own", [None, {"sat_token_id": [32011, 32012], "k": 5}])
def test_a_full_checkpoint_says_itself_which_tokens_its_sats_are(tmp_path, own):
    place = tmp_path / "CodeLlama-SDSAT_L5_7B"  # whose SAT is known by name alone
    lm = tiny_llama(torch.float32, vocab=32017)
    if own is not None:
        lm.config.sdsat = own
    lm.save_pretrained(place)
    tiny_tokenizer([chr(33 + i) for i in range(60)]).save_pretrained(place)
    sat = loading.sat_of(str(place))
    export_to_hub(str(place), tmp_path / "shared")
    assert loading.sat_of(str(tmp_path / "shared")) == sat is not None
    assert not (tmp_path / "shared" / hub.BESIDE_BASE).exists()
    assert "Base: CodeLlama-SDSAT_L5_7B" in (tmp_path / "shared/README.md").read_text()


def run(monkeypatch, capsys, *words):
    """(exit code, stdout, the last line of stderr) of `sdsat ...`."""
    monkeypatch.setattr(sys, "argv", ["sdsat", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr()
    return exit_.value.code or 0, said.out, said.err.strip().splitlines()[-1:]


def test_what_the_command_refuses(tiny, folder, tmp_path, monkeypatch, capsys):
    for words, message in [
        (["--hub", folder], f"hub={folder}: exists already"),
        ([], "expected one of --out DIR and --hub DIR"),
        (["--hub", "x", "--out", "y"], "expected one of --out DIR and --hub DIR"),
        (["--hub", "x", "--mask-token-id", "7"], "mask_token_id=7: only for a server's draft"),
        (["--out", "x", "--results", "y"], "results: only for the model card"),
        (["--hub", "x", "--results", tmp_path], f"results={tmp_path}: holds no worker_*.json"),
        (["--hub", "x", "--revision", "v1"], f"revision=v1: {tiny} is no hub id"),
    ]:
        code, _, (line,) = run(monkeypatch, capsys, "export", tiny, *words)
        assert code == 2 and message in line
    base = tiny.parent / "base"
    code, _, (line,) = run(monkeypatch, capsys, "export", base, "--hub", tmp_path / "x")
    assert code == 2 and "has no SAT; expected an adapter" in line
    assert not (tmp_path / "x").exists()


def test_the_card_has_what_was_measured_of_these_weights_alone(
    tiny, tmp_path, monkeypatch, capsys, sketches, quick_workers
):
    bench = "bench greedy TINY cpu --data-limit 1 --max-new-tokens 4 --k-list 2 --dtype float32"
    words = bench.replace("TINY", str(tiny)).split()
    code, *_ = run(monkeypatch, capsys, *words, "--results", tmp_path / "results")
    assert code == 0
    results = tmp_path / "results/tiny-sdsat/greedy"
    shared = ("export", tiny, "--hub", tmp_path / "shared", "--results", results)
    assert run(monkeypatch, capsys, *shared)[0] == 0
    rate = json.loads((results / "summary.json").read_text())["runs"][0]["tokens_per_second"]
    card = (tmp_path / "shared/README.md").read_text()
    assert f"| ar | 0 | 0 | {rate:.1f} | 1.00" in card
    (worker,) = results.glob("worker_*.json")
    worker.write_text(worker.read_text().replace(adapter_hash(str(tiny)), "0" * 64))
    code, _, (line,) = run(
        monkeypatch, capsys, "export", tiny, "--hub", tmp_path / "no", "--results", results
    )
    assert code == 2 and "measured with another adapter" in line
    assert not (tmp_path / "no").exists()


def commit_of(place):
    return hashlib.sha1(f"{place}".encode()).hexdigest()


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, of {(repository, revision): folder}."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(b"")

    def do_GET(self):
        self._answer(None)

    def _answer(self, body):
        found = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", self.path)
        places = self.server.repositories
        commits = {(name, commit_of(place)): place for (name, _), place in places.items()}
        place = (places | commits).get((found[1], found[2])) if found else None
        file = place and place / found[3]
        self.server.asked.append(self.path)
        if not file or not file.is_file():
            self.send_response(404)
            known = place or self.path.startswith("/api/")
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit_of(place))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body is None:
            self.wfile.write(content)


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """What the hub has, {(repository, revision): folder}."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repositories, server.asked = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.fetch_adapter.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    hub.fetch_adapter.cache_clear()


def test_adapters_load_by_hub_id_at_a_revision(folder, tiny, repositories, tmp_path, monkeypatch):
    other = shutil.copytree(tiny, tmp_path / "other")  # an adapter alone; its base is elsewhere
    repositories.repositories |= {
        ("user/shared", "main"): folder,
        ("user/shared", "v1"): other,
        ("user/plain", "main"): tiny.parent / "base",
    }
    assert loading.is_adapter("user/shared") and loading.places("user/shared")[1] == "user/shared"
    model, _ = sdsat.load("user/shared", "float32", "cpu")
    same, _ = sdsat.load(str(folder), "float32", "cpu")
    inputs = torch.tensor([[9, 8, 7]])
    settings = dict(max_new_tokens=9, custom_generate=sdsat.generate)
    output = model.generate(inputs, **settings)
    assert torch.equal(output, same.generate(inputs, **settings))
    earlier = hub.at_revision("user/shared", "v1")
    assert loading.places(earlier)[1] == str(tiny.parent / "base")
    assert adapter_hash(earlier) == adapter_hash(str(tiny)) != adapter_hash("user/shared")
    assert not loading.is_adapter("user/plain")
    with one_line_error("adapter=user/plain", "not an adapter"):
        sdsat.attach(loaded(folder)[0], adapter="user/plain")
    # in another process, without a network: what was fetched counts, and nothing is asked
    hub.fetch_adapter.cache_clear()
    asked = len(repositories.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
    again, _ = sdsat.load("user/shared", "float32", "cpu")
    assert torch.equal(output, again.generate(inputs, **settings))
    assert len(repositories.asked) == asked


def test_transformers_code_with_a_hub_id_at_a_revision(folder, repositories, modules, tmp_path):
    """The main branch is empty: whatever is asked for without the revision is not found."""
    repositories.repositories |= {
        ("user/tagged", "main"): tmp_path / "empty",
        ("user/tagged", "v2"): folder,
    }
    model, inputs = loaded("user/tagged", revision="v2")
    assert model.config._commit_hash == commit_of(folder)
    shared = dict(custom_generate="user/tagged", revision="v2", trust_remote_code=True)
    output = model.generate(**inputs, max_new_tokens=9, **shared)
    assert model.sdsat.model.adapter is not None
    ours, _ = sdsat.load("user/tagged", "float32", "cpu", revision="v2")
    same = ours.generate(**inputs, max_new_tokens=9, custom_generate=sdsat.generate)
    assert torch.equal(output, same)
    assert torch.equal(output, model.generate(**inputs, max_new_tokens=9))


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hub_that_cannot_be_reached_is_said_at_once(repositories, revision):
    """A path that is mistyped looks like a hub id: it is no reason to wait, or for more lines."""
    repositories.shutdown()
    repositories.server_close()
    name = hub.at_revision("runs/mistyped", revision)
    begun = time.monotonic()
    with one_line_error(f"model {name}: nothing of that name is here", "hub cannot be reached"):
        loading.load(name, "float32", "cpu")
    assert time.monotonic() - begun < 5  # its library waits for 23 seconds


def test_an_adapter_of_which_a_file_is_missing(tiny, repositories, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tiny / hub.CONFIG_FILE, half)
    repositories.repositories["user/half", "main"] = half
    with one_line_error("model user/half", "its adapter cannot be fetched"):
        loading.is_adapter("user/half")


@pytest.mark.parametrize(
    ("name", "revision", "parts"),
    [
        ("user/name@v1", None, ("user/name", "v1")),
        ("user/name@refs/pr/3", None, ("user/name", "refs/pr/3")),
        ("user/name", None, ("user/name", None)),
        ("smollm2-135m-sdsat", None, ("smollm2-135m-sdsat", None)),
        ("user/name", "main", ("user/name", "main")),
    ],
)
def test_names_with_a_revision(name, revision, parts):
    assert hub.split(hub.at_revision(name, revision)) == parts


def test_results_of_revisions_lie_apart():
    names = ("user/name", "user/name@v1", "user/name@refs/pr/3", "runs/name")
    folders = [BenchConfig(name).folder for name in names]
    assert folders == [f"name{at}/greedy" for at in ("", "@v1", "@refs-pr-3", "")]


def test_a_folder_may_have_a_name_with_an_at(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert hub.split(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    for name in (str(tmp_path), "smollm2-135m-sdsat", "user/name@v1"):
        with one_line_error("revision=v2", f"{name} is no hub id"):
            hub.at_revision(name, "v2")

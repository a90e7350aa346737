"""What settings, configurations and the tokenizer tell is refused before weights are read."""

import sys

import pytest
from common import CHARACTERS, EOS, adapted, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from sdsat.cli import main as cli
from sdsat.config import SatConfig
from sdsat.models import loading
from sdsat.models.adapter import AdapterConfig

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if loud %}!{% endif %}{% endfor %}"


@pytest.fixture
def adapter(tmp_path):
    """A chat model with an adapter of k = 3."""
    lm = tiny_llama(vocab=len(CHARACTERS), eos_token_id=EOS)
    tokenizer = tiny_tokenizer(CHARACTERS)
    tokenizer.chat_template = TEMPLATE
    model = adapted(lm, k=3)
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sample = model.adapter.config.base_sample
    config = AdapterConfig(str(tmp_path / "base"), model.sat, 4, base_sample=sample)
    model.adapter.config = config
    model.adapter.save(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def refused(adapter, tmp_path, monkeypatch, capsys):
    """Run a command whose model must not be read: the one line that it says."""
    monkeypatch.chdir(tmp_path)

    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)

    def run(*arguments):
        words = [adapter if word == "MODEL" else word for word in arguments]
        monkeypatch.setattr(sys, "argv", ["sdsat", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


PAPER = "tree=paper with k=3: the paper's trees are for k in [5, 7, 9, 11, 13]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hello", "--model", "MODEL", "--tree", "paper", "-k", "3"], PAPER),
        (["generate", "hello", "--model", "MODEL", "--tree", "paper"], PAPER),
        (["generate", "hello", "--model", "MODEL", "--tree", "5,5,5"], "tree=5,5,5 with k=3: more"),
        (["verify", "MODEL", "--tree", "paper", "--k-list", "3"], PAPER),
        (["eval", "MODEL", "--tree", "paper", "--k-list", "3"], PAPER),
        (["bench", "greedy", "MODEL", "cpu", "--tree", "paper", "--k-list", "3"], PAPER),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_tree_that_k_has_not(arguments, message, refused):
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "hello", "--model", "MODEL"],
        ["generate", "hello", "--model", "MODEL", "--as", "code"],
        ["verify", "MODEL"],
        ["eval", "MODEL"],
        ["inspect", "MODEL"],
        ["bench", "greedy", "MODEL", "cpu"],
        ["distill", "--out", "out", "--model", "MODEL"],
    ],
    ids=" ".join,
)
def test_an_option_that_the_template_does_not_know(arguments, refused):
    said = refused(*arguments, "--template-option", "quiet=true")
    assert said.startswith(
        "error: template_option=quiet=true: the chat template does not know quiet"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "verse"], "kinds=verse: verse is none of"),
        (["--source", "x.csv"], "source=x.csv: expected a folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_distilled(arguments, message, refused):
    assert message in refused("distill", "--out", "out", "--model", "MODEL", *arguments)


def test_options_without_a_chat_turn(refused):
    words = [
        "generate",
        "hello",
        "--model",
        "MODEL",
        "--as",
        "raw",
        "--template-option",
        "loud=true",
    ]
    assert "--as=raw has no chat turns" in refused(*words)


def test_the_sat_of_settings_is_that_of_the_loaded_model(adapter, tmp_path):
    base = str(tmp_path / "base")
    for name, options, k in [
        (adapter, (), 3),
        (base, (), None),
        (base, (7, 4), 4),
        (base, (7,), 5),
    ]:
        found = loading.sat_of(name, *options)
        loaded = loading.load(name, "float32", "cpu", *options).sat
        assert found == loaded and (found and found.k) == k
    assert loading.sat_of("smollm2-135m-instruct") is None
    assert loading.sat_of("smollm2-135m-sdsat").k > 1
    assert loading.sat_of("smollm2-135m-instruct", 7, 2) == SatConfig(7, 2)

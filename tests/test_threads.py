"""Several threads on one model, and plain `generate` beside them: every output is the one that it
has alone.
"""

import copy
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from common import adapted
from test_dropin import PAD, PROMPTS, batch, drafting
from test_families import COSTS, FAMILIES, PROMPT, alone, checkpoint
from transformers import LogitsProcessor, LogitsProcessorList

import sdsat
from sdsat.decoding.lock import FairLock


def plainly(lm, inputs, num):
    return lm.generate(**inputs, max_new_tokens=num, pad_token_id=PAD, do_sample=False)


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """(a model of transformers alone, {engine: the same with an adapter})."""
    folder = tmp_path_factory.mktemp("threads")
    checkpoint(folder / "base", FAMILIES["llama 3"], sat=False)
    adapted(alone(folder / "base"), k=3, strength=0.2).adapter.save(folder / "adapter")
    ours = {engine: alone(folder / "base") for engine in ("native", "transformers")}
    for engine, model in ours.items():
        sdsat.attach(model, None, str(folder / "adapter"), engine=engine).sdsat.costs = COSTS
    return alone(folder / "base"), ours


@pytest.fixture
def often():
    """Threads change places every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("engine", ["transformers", "native"])
def test_threads_on_one_model_beside_plain_generate(attached, often, engine):
    lm = attached[0]
    model = attached[1][engine]
    inputs = [batch(PROMPT), batch(*PROMPTS), batch(PROMPTS[1])]
    # the last one: plainly
    ways = [
        dict(strategy="two-step"),
        dict(strategy="auto"),
        dict(strategy="one-pass", k=2),
        None,
    ]
    asked = [(inputs[i % 3], 8 + i) for i in range(6)]
    wanted = [plainly(lm, *each) for each in asked]

    def run(way):
        return [
            plainly(model, *each) if way is None else drafting(model, *each, **way)
            for each in asked
        ]

    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(run, ways):
            assert all(torch.equal(out, want) for out, want in zip(outputs, wanted, strict=True))


class Meeting:
    """A streamer that goes on once another one, in another thread, has its first token too."""

    def __init__(self, barrier):
        self.barrier = barrier
        self.count = 0

    def put(self, value):
        self.count += 1
        if self.count == 2:  # after the prompt
            self.barrier.wait(120)

    def end(self):
        pass


def test_the_model_is_free_while_a_streamer_waits(attached):
    model = attached[1]["native"]
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        outs = list(
            pool.map(
                lambda streamer: drafting(model, streamer=streamer),
                [Meeting(barrier), Meeting(barrier)],
            )
        )
    assert torch.equal(*outs)


def test_who_comes_back_for_the_lock_waits_behind_who_waits():
    lock = FairLock()
    order = []

    def enter(lock):
        with lock.held():
            order.append("other")

    other = threading.Thread(target=enter, args=(lock,))
    with lock.held():
        other.start()
        while not lock.awaited:
            time.sleep(0.001)
        assert not order
    with lock.held(), lock.held():
        order.append("again")
    other.join()
    assert order == ["other", "again"]
    with copy.deepcopy(lock).held(), lock.held():
        free = pickle.loads(pickle.dumps(lock))
        other = threading.Thread(target=enter, args=(free,), daemon=True)
        other.start()
        other.join(60)
        assert order == ["other", "again", "other"]


class Asking(LogitsProcessor):
    """Generates with the model whose logits it is given."""

    def __init__(self, model):
        self.model = model
        self.heard = []

    def __call__(self, input_ids, scores):
        self.heard.append(drafting(self.model, dict(input_ids=input_ids), num=1))
        return scores


def test_a_processor_may_generate_with_the_same_model(attached):
    lm, ours = attached
    for model in ours.values():
        asking = Asking(model)
        out = drafting(model, num=6, logits_processor=LogitsProcessorList([asking]))
        assert torch.equal(out, plainly(lm, batch(PROMPT), 6))
        assert torch.equal(asking.heard[-1], out)

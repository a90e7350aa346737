"""The programs that peers.py runs beside ours: servers that are played by a few lines of Python."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import peers
import psutil
import pytest
from programs import llama, openvino, vllm, with_stop
from programs.server import serving

from sdsat.config import InputError
from sdsat.models.embedded import QWEN_CODER, SMOLLM2

# Answers what llama.cpp's server does: as many tokens as were asked for, counted up from the
# prompt's last; at 9 it stops, and leaves the token that stops it out.
SERVER = f"""#!{sys.executable}
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = asked["prompt"][-1] + 1
        tokens = [t for t in range(first, first + asked["n_predict"]) if t < 9]
        stopped = len(tokens) < asked["n_predict"]
        timings = {{"prompt_ms": 1e-3, "predicted_n": len(tokens) + stopped, "draft_n_accepted": 1}}
        answer = {{"tokens": tokens, "stop_type": "eos" if stopped else "limit"}}
        body = json.dumps({{**answer, "timings": timings, "argv": sys.argv[1:]}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def program(folder, name, text):
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


def playing(folder):
    """The processes that run a program of a folder."""
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if str(folder / "play") in (each.info["cmdline"] or ())]


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """A folder with the server, as setup_llama.sh makes one; and a base with a file."""
    program(tmp_path, "llama-server", SERVER)
    (tmp_path / "base.Q4_1.gguf").touch()
    monkeypatch.setattr(llama, "BUILT", tmp_path)
    monkeypatch.setattr(llama, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(llama, "stop_id_of", lambda base: 9)
    return replace(SMOLLM2, base="base")


def test_a_server_answers_and_ends_with_the_block(tmp_path):
    with serving([program(tmp_path, "play", SERVER)]) as server:
        answer = json.loads(server.open("completion", {"prompt": [3], "n_predict": 2}))
        assert answer["tokens"] == [4, 5]
        assert answer["argv"] == ["--port", str(server.port)]
        assert len(playing(tmp_path)) == 1
    assert not playing(tmp_path)


@pytest.mark.parametrize(
    ("text", "patience", "says"),
    [
        ("echo 'Error: no such model'; exit 3", 60, "ended before it answered (Error: no such"),
        ("sleep 60", 1, "did not answer in 1 seconds"),
    ],
)
def test_a_server_that_never_answers_is_one_line(tmp_path, text, patience, says):
    command = [program(tmp_path, "play", f"#!/bin/sh\n{text}\n")]
    with pytest.raises(InputError, match="play ") as error, serving(command, patience=patience):
        pass
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not playing(tmp_path)


def _killed(folder):
    with serving([str(folder / "play")]) as server:
        (folder / "port").write_text(str(server.port))
        time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends it")
def test_a_server_ends_with_a_killed_program(tmp_path, own_process):
    program(tmp_path, "play", SERVER)
    process = own_process(_killed, tmp_path)
    while not (tmp_path / "port").exists():
        time.sleep(0.05)
    servers = playing(tmp_path)
    assert len(servers) == 1
    process.kill()
    psutil.wait_procs(servers, timeout=10)
    assert not playing(tmp_path)


@pytest.mark.parametrize(
    ("limit", "tokens", "finish", "passes"),
    [(2, [7, 8], "length", 1), (3, [7, 8, 9], "stop_id", 1), (8, [7, 8, 9], "stop_id", 1)],
)
def test_llama_cpp_gives_what_ours_gives(llama_cpp, limit, tokens, finish, passes):
    name = llama.names(llama_cpp)[-1]
    assert name == "llama.cpp Q4_1 prompt lookup" and peers.ar_of(name) == "llama.cpp Q4_1"
    decode = peers.make_decoder(name, "", llama_cpp, 20)
    out = decode([5, 6], limit)
    assert (out.token_ids, out.finish, out.num_passes) == (tokens, finish, passes)
    assert out.prefill_seconds == 0.001 / 1000 and out.decode_seconds > 0


def test_peers_that_are_missing_have_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "BUILT", tmp_path)
    monkeypatch.setattr(vllm, "PROGRAM", tmp_path / "vllm")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [peer.names(QWEN_CODER) for peer in (llama, openvino, vllm)] == [[], [], []]


def test_the_token_that_ends_an_output_is_there_once():
    assert with_stop([4, 5], 9, True) == with_stop([4, 5, 9], 9, True) == [4, 5, 9]
    assert with_stop([4, 5], 9, False) == [4, 5] and with_stop([], 9, True) == [9]


def test_the_peak_is_of_children_too():
    before = peers.peak_mib()
    child = os.fork()
    if not child:
        held = bytearray(200 * 2**20)
        held[::4096] = b"x" * len(held[::4096])
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        assert peers.peak_mib() >= before + 190
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_ends_while_the_peak_is_read_is_passed_over(monkeypatch):
    done = subprocess.Popen(["true"])
    gone = psutil.Process(done.pid)
    done.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [gone])
    assert peers.peak_mib() > 10

"""A worker's last words: everything it prints, native crashes included, is in its log, and the closing line quotes it."""

import subprocess
import sys

import pytest

from sdsat import bench

DEATHS = {
    "raise RuntimeError('CUDA out of memory')": (1, "RuntimeError: CUDA out of memory"),
    "import os; os.system('echo from native code'); os.abort()": (-6, "Fatal Python error: Aborted"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_workers_last_words_are_in_its_log(tmp_path, death):
    code, trace = DEATHS[death]
    log = tmp_path / "worker_0+1.log"
    log.write_text("of an earlier run\n")
    script = (
        f"from pathlib import Path; from sdsat import bench; bench._log_to(Path({str(log)!r}), 'title'); print('said'); {death}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    text = log.read_text()
    assert text.startswith("of an earlier run\n") and "title\n" in text and trace in text
    assert ("from native code" in text) == (code == -6)
    line = bench._obituary("0+1", code, log)
    assert line == f"worker 0+1 (exit code {code}{', ' + trace if code > 0 else ''}; log: {log})"


def test_labels_are_distinct():
    assert bench._labels(["cpu", "0", "cpu", "0+1", "0+1", "cpu"]) == ["cpu", "0", "cpu.1", "0+1", "0+1.1", "cpu.2"]

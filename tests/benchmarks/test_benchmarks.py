"""The benchmarks run on a small model, print what they measured beside the targets, and fail when they must."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script, *options):
    return subprocess.run([sys.executable, FOLDER / script, "--model", "random", "--config", "tiny", *options],
                          capture_output=True, text=True, timeout=500)


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import common
    return common


def test_decode_compares_every_logit_and_reports():
    done = run("decode.py", "--count", "5")
    assert done.returncode == 0, done.stderr
    # 11 tokens of prompt and 4 steps, each with the logits of the whole vocabulary
    assert f"bit for bit: {(11 + 4) * 96:,} logits compared, all equal, and all of memory" in done.stdout
    assert re.search(r"cycles per token +[\d,]{4,} \| +simulated", done.stdout)
    assert re.search(r"memory bandwidth used +\d\d\.\d% \| >= \d\d.\d% +(met|MISSED) +simulated", done.stdout)
    for name in ("array waits for weights", "tokens/s on this machine", "peak memory", "start from the cache, s"):
        assert name in done.stdout


def test_accuracy_reports_against_targets(tmp_path):
    np.savez(tmp_path / "tokens.npz", tokens=np.random.default_rng(1).integers(0, 96, (2, 20)))
    done = run("accuracy.py", str(tmp_path / "tokens.npz"), "--limit", "1")
    assert done.returncode == 0, done.stderr
    assert "1 sequences of up to 20 tokens" in done.stdout and re.search(r"predictions +19 \|", done.stdout)
    assert re.search(r"KL divergence, nats per token +\d\.\d\de-\d\d \| <= [\d.e-]+ +(met|MISSED)", done.stdout)


def test_kv_compares_both_levels_and_fails_where_a_target_is_missed(tmp_path):
    """The tiny overlay's pipelines, not its memory, set the pace, so that it misses the shares of the peak."""
    done = subprocess.run([sys.executable, FOLDER / "kv.py", "--config", "tiny", "--layers", "4", "--kv-heads", "2",
                           "--head-dim", "16", "--tokens", "32", "128", "--output", tmp_path],
                          capture_output=True, text=True, timeout=500)
    assert "counters and results of all 10 rows are the functional level's" in done.stdout, done.stderr
    assert re.search(r"reuse, buffer, effective \(paper 101.5%\) +\d+.\d% \| >= 112% +MISSED", done.stdout)
    assert re.search(r"KV storage saved \(paper 25.4%\) +25.00% \| >= 24.9% +met", done.stdout)
    assert done.returncode == 1 and (tmp_path / "cost.png").stat().st_size > 10_000


def test_u280_compares_bits_bytes_and_cycles(tmp_path):
    """Any configuration will do; here one layer of the smallest shape on the smallest one."""
    done = subprocess.run([sys.executable, FOLDER / "u280.py", "--config", "tiny", "--geometry", "smollm2-135m",
                           "--layers", "1", "--context", "20", "--skip", "0", "--check", "--folder", tmp_path],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\| 0% skipped, decode, 20 positions \| [\d,]{7,} \|.* \| equal \|$", done.stdout, re.M)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "message"), [
    (["--geometry", "llama2-8b"], "unknown geometry 'llama2-8b', did you mean 'llama2-7b'?"),
    (["--config", "u280,port=16"], "a size is like kvbuf_heads=128, not 'port=16'"),
    (["--config", "u280,kvbuf_heads=64", "--geometry", "llama2-13b"],
     "llama2-13b does not fit configuration u280,kvbuf_heads=64: kvbuf_heads (KV heads x head_dim / lanes) must be at"),
])
def test_u280_mistakes_are_one_line(options, message):
    done = subprocess.run([sys.executable, FOLDER / "u280.py", *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("script", "options", "message"), [
    ("accuracy.py", ["absent.npz"], "absent.npz: cannot be read"),
    ("accuracy.py", [], "has no tokenizer for paragraphs.txt"),
    ("decode.py", ["--context", "8"], "11 tokens do not fit: the context holds 8 positions"),
])
def test_mistakes_are_one_line(script, options, message):
    done = run(script, *options)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_table_shows_values_beside_targets(common, capsys):
    common.show("speed", [common.Row("rate", 2.5, "measured", "{:.1f}", common.at_least(2)),
                          common.Row("error", 0.5, "simulated", "{:.0%}", common.at_most(0.25, "{:.0%}")),
                          common.Row("build", None, target=common.at_most(9)), common.Row("cycles", 12345)])
    assert capsys.readouterr().out.splitlines() == [
        "", "speed", "          measured | target",
        "  rate         2.5 | >= 2    met     measured", "  error        50% | <= 25%  MISSED  simulated",
        "  build          - | <= 9            measured", "  cycles    12,345 |                 measured"]

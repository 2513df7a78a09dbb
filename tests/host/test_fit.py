"""Predictions of whole workloads: fit, bound, rates; and the command."""

import json

import pytest
from skipopu.golden.random_model import random_model, write_gguf
from skipopu.host.cli import main
from skipopu.host.errors import CapacityError, RequestError
from skipopu.host.model import ModelConfig
from skipopu.host.performance.fit import Workload, bound, fit, resized, spread
from skipopu.host.performance.geometries import GEOMETRIES
from skipopu.host.performance.memory import HbmMemory
from skipopu.host.performance.resources import DEVICE, estimate_resources
from skipopu.host.plan import make_plan
from skipopu.hw.config import ConfigError, preset
from skipopu.sim.hbm import HbmTiming

SMALL = ModelConfig(name="small", layers=3, hidden=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, vocab=2048,
                    context=512)
SIM = preset("sim")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_decode_is_bound_by_memory_and_reads_what_the_model_holds():
    found = fit(SMALL, SIM, Workload(prompt=16, count=33, memory="ideal"))
    assert found.bound == "memory"
    weights = 3 * (2 * 192 * 576 + 2 * 576 * 576 + 3 * 576 * 1536) + 2048 * 576
    assert found.bytes_per_token == pytest.approx(weights * 4.5 / 8, rel=0.12)  # and keys, values, gains
    assert 0.5 < found.share_of_peak == pytest.approx(found.bytes_per_token / found.cycles_per_token / 512)
    assert found.share_of_memory == found.share_of_peak  # ideal memory delivers its peak
    assert found.tokens_per_second == 225e6 / found.cycles_per_token


def test_skipping_saves_what_it_leaves_unread():
    plain = fit(SMALL, SIM, Workload(prompt=16, count=2, memory="ideal"))
    skipping = fit(SMALL, SIM, Workload(prompt=16, count=2, skip=0.5, kv="reuse", memory="ideal", seed=3))
    assert skipping.bytes_per_token < 0.85 * plain.bytes_per_token
    assert skipping.cycles_per_token < 0.9 * plain.cycles_per_token


def test_the_history_buffer_serves_what_layers_share():
    size = {"prompt": 300, "count": 1, "skip": 0.3, "kv": "reuse", "memory": "ideal"}
    with_buffer, without = (fit(SMALL, SIM, Workload(**size, buffer=number), samples=1) for number in (None, 0))
    records = SMALL.layers * 4 * SMALL.kv_heads * SMALL.head_dim * 300
    served = with_buffer.served * with_buffer.bytes_per_token
    assert without.served == 0 < served < 0.4 * records
    assert with_buffer.bytes_per_token + served == pytest.approx(without.bytes_per_token)
    assert with_buffer.cycles_per_token < without.cycles_per_token
    assert with_buffer.effective_share > with_buffer.share_of_peak


@pytest.mark.parametrize("count, samples", [(1024, 4), (1024, 16), (2048, 8)])
def test_positions_and_their_places_in_a_tile_are_spread(count, samples):
    found = spread(128, count, samples, 128)
    assert len(set(found)) == samples and all(128 <= at < 128 + count for at in found)
    assert sum(found) / samples == pytest.approx(128 + count / 2, rel=0.1)
    assert sum(at % 128 for at in found) / samples == pytest.approx(64, abs=6)
    assert spread(7, 1, 4, 128) == [7] and spread(7, 3, 4, 128) == [7, 8, 9]


def test_data_of_writes_wait_for_the_reads_before():
    def response(bursts):
        memory = HbmMemory(2, 64, HbmTiming())
        for burst in range(bursts):
            memory.read(0, 16, 16 * burst)
        return memory.write(20, 16, 4096, 0)
    quiet, little, busy = map(response, (0, 1, 30))
    assert quiet <= little < busy - 20 * 16 and response(31) - busy == pytest.approx(16, abs=3)


def test_other_sizes_make_another_configuration():
    assert resized(SIM, ["kvbuf_heads=80"]).kvbuf_heads == 80 and resized(SIM, ()) is SIM
    with pytest.raises(RequestError, match="a size is like kvbuf_heads=128, not 'heads=3'"):
        resized(SIM, ["heads=3"])
    with pytest.raises(ConfigError, match="kvbuf_heads must be a positive number, not 0"):
        resized(SIM, ["kvbuf_heads=0"])
    with pytest.raises(ConfigError, match="kvout_rows must be a power of two, not 80"):
        resized(SIM, ["kvout_rows=80"])


def test_narrow_kv_records_save_their_bytes():
    plain, twelve, eight = (fit(SMALL, SIM, Workload(prompt=500, count=1, memory="ideal", kv_format=name), samples=1)
                            for name in ("fp16", "12", "8"))
    records = SMALL.layers * 2 * SMALL.kv_heads * SMALL.head_dim * 500
    assert plain.bytes_per_token - twelve.bytes_per_token == pytest.approx(records / 2, rel=0.4)  # less the exponents
    assert plain.bytes_per_token - eight.bytes_per_token == pytest.approx(records, rel=0.2)
    assert eight.cycles_per_token < twelve.cycles_per_token < plain.cycles_per_token


def test_timed_memory_costs_its_refreshes():
    ideal, timed = (fit(SMALL, SIM, Workload(prompt=16, count=1, memory=name)) for name in ("ideal", "hbm"))
    assert 1 < timed.cycles_per_token / ideal.cycles_per_token < 1.25
    assert timed.share_of_memory > timed.share_of_peak


def test_prefill_is_bound_by_the_array_and_grows_with_the_prompt():
    short, long = (fit(SMALL, SIM, Workload(prompt=size, count=1, memory="ideal")).prefill_cycles for size in (32, 72))
    assert 2.1 < long / short < 2.7  # 72 / 32, and more keys


def test_the_dominant_term_is_the_largest():
    assert bound({"memory": 5.0, "array": 7.0, "vector": 1.0, "latency": 2.0}) == "array"


def test_says_everything_that_is_too_small():
    small = preset("ulx3s")
    match = rf"llama2-13b .* state_rows .* is {small.state_rows}; .*; kvbuf_heads .* 1280 but is {small.kvbuf_heads}; "
    with pytest.raises(CapacityError, match=match):
        fit(GEOMETRIES["llama2-13b"], small, Workload())


@pytest.mark.parametrize("name, chunk", [("llama2-7b", 32), ("llama2-13b", 30), ("llama3.1-8b", 32)])
def test_what_u280_is_made_for_fits(name, chunk):
    """And the estimate says that the device has room."""
    assert make_plan(preset("u280"), GEOMETRIES[name], 1152, "reuse").chunk == chunk
    found = estimate_resources(preset("u280"))
    assert all(found[name] < DEVICE[name] for name in DEVICE)


@pytest.mark.parametrize("fields, message", [
    ({"prompt": 0}, "prompt and count must be at least 1 token, not 0 and 1024"),
    ({"skip": 0.25}, "tokens that skip modules need a KV mode"),
])
def test_refuses_workloads(fields, message):
    with pytest.raises(RequestError, match=message):
        Workload(**fields)


def test_command_reports_a_geometry(capsys):
    code, out, _ = run(capsys, "--geometry", "smollm2-135m", "--config", "sim", "--prompt", "1", "-n", "1", "--memory",
                       "ideal", "--json")
    report = json.loads(out)
    assert code == 0 and report["bound"] == "memory" and report["fits_memory"]
    assert report["labels"]["tokens_per_second"] == "predicted"
    assert 500 < report["tokens_per_second"] < 2000


def test_command_takes_a_model_file(capsys, tmp_path):
    write_gguf(random_model(5, kinds=("q4_1",)), tmp_path / "m.gguf")
    code, out, _ = run(capsys, "-m", str(tmp_path / "m.gguf"), "--config", "tiny", "--prompt", "4", "-n", "8", "--skip",
                       "0.25")
    assert code == 0 and out.startswith("random-5 fits configuration tiny: chunks of 4 tokens")
    assert out.count("(predicted)") == 9


@pytest.mark.parametrize("arguments, message", [
    (["--geometry", "gpt-2"], "skipopu: unknown geometry 'gpt-2'; known: llama2-7b, "),
    (["--geometry", "smollm2-135m", "--memory", "ddr"], "skipopu: memory must be ideal or hbm, not 'ddr'"),
    (["--geometry", "llama2-7b", "--config", "sim"], "skipopu: model llama2-7b does not fit configuration sim: "),
    (["--geometry", "smollm2-135m", "--weights", "q2"], "skipopu: weights must be q8_0, q4_0, q4_1, q4_g64, "
                                                           "q4_g128, q4m_g64, q4m_g128, not 'q2'"),
])
def test_command_answers_mistakes_in_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "") and err.startswith(message) and err.count("\n") == 1

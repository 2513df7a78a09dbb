"""Sweeps of configurations: results that go on where they were, refused files, what nothing beats, processes, Ray."""

import json
from dataclasses import replace

import pytest
from skipopu.host.cli import main
from skipopu.host.errors import RequestError
from skipopu.host.performance import explore as module
from skipopu.host.performance.explore import ExploreError, Sweep, evaluate, explore, pareto
from skipopu.host.performance.fit import Workload, fit
from skipopu.host.performance.geometries import find_geometry
from skipopu.host.performance.resources import DEVICE, estimate_resources
from skipopu.hw.config import preset

SWEEP = Sweep(base=preset("sim"), axes={"ports": (4, 8), "columns": (32, 64)}, geometries=("smollm2-135m",),
              skips=(0.0, 0.5), prompt=1, count=1, memory="ideal")


def fake(sweep, point):
    """A result at once: speed and cost grow with the ports."""
    ports = dict(point.sizes)["ports"]
    return {"geometry": point.geometry, "skip": point.skip, "kv_format": point.kv_format,
            "sizes": dict(point.sizes), "bound": "memory", "share_of_peak": 0.9,
            "tokens_per_second": 10 * ports * (1 + point.skip), "resources": {"luts": 100 * ports, "dsps": 1}}


@pytest.fixture
def quick(monkeypatch):
    """Counts points, which cost nothing."""
    seen = []
    monkeypatch.setattr(module, "evaluate", lambda sweep, point: seen.append(point.key) or fake(sweep, point))
    return seen


def test_points_are_what_fit_and_the_estimate_say():
    point = next(point for point in SWEEP.points() if dict(point.sizes) == {"ports": 4, "columns": 64} and point.skip)
    found = evaluate(SWEEP, point)
    config = replace(preset("sim"), ports=4)
    same = fit(find_geometry("smollm2-135m"), config, Workload(prompt=1, count=1, skip=0.5, kv="reuse", memory="ideal"),
               samples=1)
    assert found["tokens_per_second"] == same.tokens_per_second and found["bound"] == same.bound
    assert found["resources"] == estimate_resources(config)


def test_points_that_cannot_be_are_said_so():
    impossible = Sweep(base=preset("sim"), axes={"columns": (32,)}, geometries=("llama2-7b",), skips=(0.0,))
    assert "columns must be at least 2 x lanes" in evaluate(impossible, next(impossible.points()))["refused"]
    large = Sweep(base=preset("sim"), axes={}, geometries=("llama2-7b",), skips=(0.0,))
    assert "llama2-7b does not fit configuration explored" in evaluate(large, next(large.points()))["refused"]


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path, quick):
    path = tmp_path / "results.jsonl"
    whole = explore(SWEEP, path)
    assert len(quick) == len(set(quick)) == 8 and len(path.read_text().splitlines()) == 9
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])  # three results, and one that was being written
    del quick[:]
    assert explore(SWEEP, path) == whole and len(quick) == 5
    assert explore(SWEEP, path) == whole and len(quick) == 5
    wider = replace(SWEEP, axes={"ports": (4, 8, 16), "columns": (64,)})
    assert len(explore(wider, path)) == 6 and len(quick) == 5 + 2 + 0 * 4  # only the new ports


def test_formats_of_kv_records_are_swept(tmp_path, quick):
    formats = replace(SWEEP, axes={"ports": (4,)}, kv_formats=("fp16", "8"))
    assert [item["kv_format"] for item in explore(formats, tmp_path / "results.jsonl")] == ["fp16", "8"] * 2
    with pytest.raises(RequestError, match="KV format must be fp16, 12, 8, not 'int8'"):
        replace(SWEEP, kv_formats=("int8",))


@pytest.mark.parametrize("change, message", [
    ({"version": 1}, "is of version 1, this program writes version 3; name another file, or remove it"),
    ({"format": "other"}, "holds no results of a sweep"),
    ({"settings": {"prompt": 99}}, "was made with another base"),
])
def test_other_results_are_refused(tmp_path, quick, change, message):
    path = tmp_path / "results.jsonl"
    explore(SWEEP, path)
    first, *rest = path.read_text().splitlines()
    text = "\n".join([json.dumps(json.loads(first) | change), *rest])
    path.write_text(text)
    with pytest.raises(ExploreError, match=message):
        explore(SWEEP, path)
    assert path.read_text() == text and len(quick) == 8


def test_the_front_is_what_nothing_beats():
    results = [{"tokens_per_second": speed, "resources": {"luts": luts}} for speed, luts in
               ((10, 5), (20, 5), (15, 9), (30, 9), (30, 12), (31, 20))] + [{"refused": "too small"}]
    assert pareto(results) == [1, 3, 5]


def test_processes_and_ray_give_the_same(tmp_path):
    small = replace(SWEEP, axes={"ports": (4, 8)}, skips=(0.0,))
    alone, both, cluster = (explore(small, tmp_path / f"{name}.jsonl", jobs=2 if name != "alone" else 1,
                                    ray="local" if name == "ray" else None) for name in ("alone", "both", "ray"))
    assert alone == both == cluster and len(alone) == 2
    assert alone[1]["tokens_per_second"] > 1.3 * alone[0]["tokens_per_second"]  # twice the ports


def test_without_ray_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ExploreError, match="--ray needs the package ray, which is not installed: pip install"):
        explore(SWEEP, tmp_path / "results.jsonl", ray="local")


@pytest.mark.parametrize("fields, message", [
    ({"axes": {"speed": (1,)}}, "speed cannot be swept; known: lanes, columns, ports"),
    ({"geometries": ("gpt-2",)}, "unknown geometry 'gpt-2'; known: llama2-7b"),
])
def test_refuses_sweeps(fields, message):
    with pytest.raises(RequestError, match=message):
        replace(SWEEP, **fields)


def test_the_estimate_is_what_yosys_counts():
    """The sums of docs/boards.md, counted when FIFOs held 512 beats."""
    counted = {"luts": 1_023_921, "ffs": 686_272, "dsps": 7445, "bram36": 1731, "uram": 716}
    found = estimate_resources(replace(preset("u280"), fifo_beats=512))
    assert found == {name: pytest.approx(count, rel=0.02) for name, count in counted.items()}


def test_the_estimate_grows_with_what_is_larger():
    found = estimate_resources(preset("u280"))
    assert all(found[name] < DEVICE[name] for name in DEVICE)
    plain = estimate_resources(replace(preset("u280"), buffer_beats=0, kv_narrow=False))
    assert found["uram"] - plain["uram"] == 32 * 15 and found["luts"] > 1.05 * plain["luts"]
    smaller = estimate_resources(replace(preset("u280"), columns=64, lanes=32, ports=16))
    assert 2.5 < found["dsps"] / smaller["dsps"] < 4.1 and found["luts"] > 1.8 * smaller["luts"]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["explore", *map(str, arguments)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_command_writes_results_picture_and_table(capsys, tmp_path, quick):
    code, out, err = run(capsys, "--config", "sim", "--sweep", "ports=4,8", "--geometry", "smollm2-135m", "-o",
                         tmp_path)
    assert code == 0 and "| smollm2-135m | 25% | ports 8 | 100.0 | memory |" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pareto.md", "pareto.png", "results.jsonl"]
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "4 points, 0 of them" in err


@pytest.mark.parametrize("arguments, message", [
    (["--sweep", "ports=a"], "skipopu: --sweep ports takes numbers with commas, not 'a'"),
    (["--sweep", "speed=1"], "skipopu: speed cannot be swept; known: "),
    (["--geometry", "gpt-2"], "skipopu: unknown geometry 'gpt-2'; known: "),
])
def test_command_answers_mistakes_in_one_line(capsys, tmp_path, arguments, message):
    code, out, err = run(capsys, "-o", tmp_path, *arguments)
    assert (code, out) == (1, "") and err.startswith(message) and err.count("\n") == 1

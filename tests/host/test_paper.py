"""The paper's tables beside ours: rows, gaps, files that are wrong; the tables themselves on a small configuration."""

import json
from types import SimpleNamespace

import pytest
from skipopu.host.cli import main
from skipopu.host.errors import RequestError
from skipopu.host.performance import command, paper
from skipopu.host.performance.paper import Row, Section, decode_section, document, kv_section, prefill_section
from skipopu.hw.config import preset


def quiet(line):
    """Progress that nobody sees."""


@pytest.mark.parametrize("row, cells", [
    (Row("share", 0.884, 0.902, "predicted", "cmd"), ["share", "88.4%", "90.2%", "predicted", "+1.8 points", "`cmd`"]),
    (Row("rate", 143.4, 140.0, "predicted", "", "{:.1f}"), ["rate", "143.4", "140.0", "predicted", "-2.4%", ""]),
    (Row("lut", -0.572, -0.6, "estimated", "c"), ["lut", "-57.2%", "-60.0%", "estimated", "-2.8 points", "`c`"]),
    (Row("none", 0.5, None, "simulated", ""), ["none", "50.0%", "-", "-", "-", ""]),
    (Row("ours", None, 2.0, "predicted", "", "{:.2f}x"), ["ours", "-", "2.00x", "predicted", "-", ""]),
])
def test_rows_state_value_label_and_gap(row, cells):
    assert row.cells() == cells


def test_decode_is_predicted_and_what_does_not_fit_is_said():
    found = decode_section(preset("sim"), quiet, ("smollm2-135m", "llama2-13b"))
    rows = {row.what: row for row in found.rows}
    rate = rows["smollm2-135m, 25% skipped, q4_g128: tokens/s"]
    assert rate.label == "predicted" and 800 < rate.ours < 3000
    assert rows["smollm2-135m, 25% skipped, q4_g128: GB per token"].ours == pytest.approx(0.072, rel=0.1)
    assert rows["llama2-13b, 25% skipped, q4_g128: tokens/s"].ours is None
    assert found.notes[0].startswith("llama2-13b, 25% skipped, q4_g128: model llama2-13b does not fit configuration ")


def test_steps_of_figure_8_save_time_each():
    found = prefill_section(preset("sim"), quiet, "smollm2-135m", (32,))
    skip, reuse, fused, *decode = [row.ours for row in found.rows]
    assert 1.05 < skip <= reuse < fused < 2.2 and all(1 <= gain < 2 for gain in decode)
    assert [row.paper for row in found.rows[:3]] == [1.14, 1.29, 1.40]


def kv_rows():
    """Two contexts with and without the buffer."""
    return [{"pattern": pattern, "tokens": tokens, "buffer_bytes": size, "physical_share": 0.8 + tokens / 1e5,
             "effective_share": 0.9 + size / 1e6 + tokens / 1e5, "storage_saved": 0.25}
            for pattern in ("dense", "random", "alternate") for tokens in (128, 2048) for size in (0, 4096)]


def test_kv_figures_are_those_of_the_largest_context(tmp_path):
    path = tmp_path / "kv.json"
    path.write_text(json.dumps({"config": "kv", "layers": 16, "memory": "hbm", "rows": kv_rows()}))
    dense, plain, buffered, alternate, storage = kv_section(path).rows
    assert dense.ours == pytest.approx(0.82048) and plain.ours == pytest.approx(0.92048)
    assert buffered.ours == alternate.ours == pytest.approx(0.92048 + 0.004096) and storage.ours == 0.25
    assert [row.ours for row in kv_section(None).rows] == [None] * 5


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 1}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "kv.json").write_text(text)
    with pytest.raises(RequestError, match="holds no results of `skipopu bench kv`; give the kv.json"):
        kv_section(tmp_path / "kv.json")


def test_synthesis_is_asked_for_and_shares_stand_beside_the_papers(monkeypatch):
    unit = {"luts_per_product": 40, "baseline_luts_per_product": 100, "error_mean_relative": 0.001,
            "baseline_error_mean_relative": 0.005}
    modules = {"skipopu.bitstream.estimate": SimpleNamespace(estimate=lambda *_: unit),
               "skipopu.bitstream.whole": SimpleNamespace(PAPER={"LUT": 0.9885}, whole=lambda *_: {
                   "device": "XCU280", "shares": {"LUT": 0.7, "BRAM36": 0.2}})}
    monkeypatch.setattr(paper, "import_module", modules.__getitem__)
    first, second = paper.unit_section(preset("u280"), quiet), paper.whole_section(preset("u280"), quiet)
    assert [row.ours for row in first.rows] == [pytest.approx(-0.6), 0.001, 0.005]
    assert [row.cells()[1:5] for row in second.rows] == [["98.85%", "70.00%", "estimated", "-28.85 points"],
                                                         ["-", "20.00%", "estimated", "-"]]


def test_what_is_not_synthesised_is_left_open():
    found = paper.whole_section(preset("u280"), quiet, synthesise=False)
    assert {row.what: row.ours for row in found.rows} == dict.fromkeys(("LUT", "FF", "DSP", "URAM"))
    with pytest.raises(RequestError, match="--synthesis takes all, unit, none, not 'some'"):
        paper.sections(preset("u280"), kv_section(None), "some", quiet)


def test_resources_come_from_a_report(tmp_path):
    path = tmp_path / "u280.json"
    report = {"config": "u280", "device": "XCU280", "shares": {"LUT": 0.7, "BRAM36": 0.2}}
    path.write_text(json.dumps(report))
    found = paper.whole_section(preset("u280"), quiet, synthesise=False, report=str(path))
    assert [row.cells()[:5] for row in found.rows] == [
        ["LUT of XCU280", "98.85%", "70.00%", "estimated", "-28.85 points"],
        ["BRAM36 of XCU280", "-", "20.00%", "estimated", "-"]]
    with pytest.raises(RequestError, match=r"u280\.json is of configuration u280, not tiny"):
        paper.whole_section(preset("tiny"), quiet, report=str(path))


@pytest.mark.parametrize("text", [None, "", "[]", '{"config": "u280", "device": "XCU280"}',
                                  '{"config": "u280", "device": "XCU280", "shares": {"LUT": "much"}}'])
def test_other_reports_of_resources_are_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "u280.json").write_text(text)
    with pytest.raises(RequestError, match="holds no report of `skipopu synth --config u280 --json`; give what it"):
        paper.whole_section(preset("u280"), quiet, report=str(tmp_path / "u280.json"))


def test_command_writes_the_page(capsys, tmp_path, monkeypatch):
    some = Section("Table 9: things", [Row("thing", 0.5, 0.6, "predicted", "skipopu fit")], ["Why."])
    monkeypatch.setattr(paper, "sections", lambda *_: [some])
    with pytest.raises(SystemExit) as end:
        main(["bench", "paper", "-o", str(tmp_path / "paper.md"), "--synthesis", "none"])
    assert end.value.code == 0 and "thing  50.0%  60.0%  predicted  +10.0 points" in capsys.readouterr().out
    text = (tmp_path / "paper.md").read_text()
    assert text == document([some], preset("u280"), "skipopu bench paper --synthesis none")
    assert "| thing | 50.0% | 60.0% | predicted | +10.0 points | `skipopu fit` |" in text and "\nWhy.\n" in text
    assert command.paper.__doc__

"""The profiler: timeline, analysis and report, from the RTL and from the functional level with predicted times."""

import html.parser
import json
import re
import shutil
import sqlite3
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent
from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig
from skipopu.golden.random_model import random_model, write_gguf
from skipopu.host.cli import main
from skipopu.host.compiler import compile_model
from skipopu.host.performance import analysis
from skipopu.host.performance.profile import FILES, open_profiled, write_profile
from skipopu.host.routes import RandomRoutes, always_executing
from skipopu.hw.config import preset

CONFIG = preset("tiny")
PROMPT, COUNT = [1, 2, 3, 4, 5, 6], 3  # two chunks, then two runs of one token
FIGURES = ("breakdown", "layers", "timeline", "roofline")


@pytest.fixture(scope="module", params=["rtl", "functional"])
def profiled(request, tmp_path_factory):
    """(folder, accelerator, what profile.json holds) of a routed model."""
    model = random_model(1, kinds=("q4_0",), layers=3)
    compiled = compile_model(model, CONFIG, 32, always_executing(model, "reuse"))
    folder = tmp_path_factory.mktemp(request.param)
    accelerator = open_profiled(request.param, compiled, lambda line: None, RandomRoutes(0.4, 2))
    with accelerator.device:
        list(accelerator.generate(PROMPT, COUNT))
    found = write_profile(folder, "a <small> model", CONFIG, accelerator.recordings, {"device": request.param})
    return folder, accelerator, found


def query(path, sql):
    """Rows of a query on a trace: by Perfetto's trace processor, if it is there, else on the same tables in SQLite."""
    shell = shutil.which("trace_processor_shell")
    if shell:
        with TraceProcessor(trace=str(path), config=TraceProcessorConfig(bin_path=shell)) as processor:
            return [tuple(row.__dict__.values()) for row in processor.query(sql)]
    tables = sqlite3.connect(":memory:")
    tables.executescript("create table track (id, name, parent_id); create table annotation (slice_id, name, value); "
                         "create table slice (id integer primary key, ts, dur, track_id, name)")
    trace, open_slices = Trace(), {}
    trace.ParseFromString(path.read_bytes())
    for packet in trace.packet:
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            tables.execute("insert into track values (?, ?, ?)", (track.uuid, track.name, track.parent_uuid))
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        stack = open_slices.setdefault(event.track_uuid, [])
        if event.type == TrackEvent.TYPE_SLICE_END:
            begun, row = stack.pop()
            tables.execute("update slice set dur = ? where id = ?", (packet.timestamp - begun, row))
            continue
        row = tables.execute("insert into slice (ts, dur, track_id, name) values (?, 0, ?, ?)",
                             (packet.timestamp, event.track_uuid, event.name)).lastrowid
        for note in event.debug_annotations:
            value = getattr(note, note.WhichOneof("value"))
            tables.execute("insert into annotation values (?, ?, ?)", (row, note.name, value))
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            stack.append((packet.timestamp, row))
    assert not any(open_slices.values()), "slices that never end"
    return tables.execute(sql).fetchall()


def by_track(path):
    """Sum of durations by the name of a track."""
    return dict(query(path, "select track.name, sum(slice.dur) from slice join track on slice.track_id = track.id "
                            "group by track.name"))


def test_the_trace_has_a_track_for_every_unit_port_and_token(profiled):
    folder, accelerator, _ = profiled
    names = {name for name, in query(folder / "trace.pftrace", "select name from track")}
    label = accelerator.recordings[0].label
    assert {f"{group} ({label})" for group in ("units", "memory ports", "tokens")} <= names
    assert {"LOAD", "COMPUTE", "VECTOR", "STORE", "CONTROL"} <= names
    assert {f"port {port}" for port in range(CONFIG.ports)} <= names
    assert {f"token {position}" for position in range(len(PROMPT) + COUNT - 1)} <= names


def test_the_trace_holds_every_instruction_once(profiled):
    folder, accelerator, _ = profiled
    total = sum(len(recording.spans) for recording in accelerator.recordings)
    found = query(folder / "trace.pftrace", "select count(*) from slice join track on slice.track_id = track.id where "
                                            "track.name in ('LOAD', 'COMPUTE', 'VECTOR', 'STORE', 'CONTROL')")
    assert found == [(total,)]
    matmuls = sum(run.stats.counters["instructions"] for run in accelerator.recordings)
    assert total == matmuls


def test_the_trace_shows_what_each_token_skipped(profiled):
    folder, accelerator, _ = profiled
    skipped = query(folder / "trace.pftrace",
                    "select track.name, slice.name from slice join track on slice.track_id = track.id "
                    "where slice.name like 'layer %' order by track.name, slice.name")
    decisions = accelerator.decisions
    assert len(skipped) == decisions.shape[0] * decisions.shape[2]
    for track, name in skipped:
        layer, position = int(name.split()[1].rstrip(",")), int(track.split()[1])
        parts = [module for module, ran in zip(("attention", "mlp"), decisions[layer, :, position]) if not ran]
        assert name == f"layer {layer}" + (f", {' and '.join(parts)} skipped" if parts else "")
    assert not decisions.all() and decisions.any()


def test_no_unit_does_two_things_at_once(profiled):
    folder, accelerator, _ = profiled
    cycles = sum(recording.cycles for recording in accelerator.recordings)
    for track, busy in by_track(folder / "trace.pftrace").items():
        if track in ("LOAD", "COMPUTE", "VECTOR", "STORE") or track.startswith("port"):
            assert 0 < busy <= cycles, track


def test_both_formats_hold_the_same(profiled):
    folder, _, found = profiled
    document = json.loads((folder / "trace.json").read_text())
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in document["traceEvents"]
             if event["name"] == "thread_name"}
    sums = {}
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            name = names[event["pid"], event["tid"]]
            sums[name] = sums.get(name, 0) + round(event["dur"] * 1000)
    assert sums == by_track(folder / "trace.pftrace")
    assert document["otherData"]["label"] == found["labels"]["cycles"]


def test_every_cycle_counts_once(profiled):
    _, accelerator, found = profiled
    assert found["cycles"] == sum(recording.cycles for recording in accelerator.recordings)
    assert sum(found["breakdown"].values()) == found["cycles"]
    assert sum(row["cycles"] for row in found["layers"]) == pytest.approx(found["cycles"], rel=0.01)
    for row in found["layers"]:
        assert sum(row[cause] for cause in analysis.CAUSES) == row["cycles"]
    counted = sum(item["cycles"] for item in found["instructions"])
    assert 0.9 * found["cycles"] < counted <= found["cycles"]
    costs = [item["cycles"] for item in found["costliest"]]
    assert len(costs) == 10 and costs == sorted(costs, reverse=True)
    assert found["costliest"][0]["text"].startswith("loadw imm=")


def test_skipped_modules_are_counted_by_layer(profiled):
    _, accelerator, found = profiled
    decisions = accelerator.decisions
    for row in found["layers"]:
        if row["layer"] >= 0:
            ran = decisions[row["layer"], 0 if row["module"] == "attention" else 1]
            assert (row["tokens"], row["skipped"]) == (len(ran), int((~ran).sum()))


def test_no_matmul_is_above_the_roofs(profiled):
    *_, found = profiled
    roofs = found["roofs"]
    assert {"gate_up, decode", "QK, chunk"} <= {point["name"] for point in found["roofline"]}
    for point in found["roofline"]:
        assert point["rate"] <= 1.01 * roofs["products_per_cycle"]
        if not point["name"].startswith(("QK", "PV")):  # what they read was loaded before
            assert point["rate"] <= 1.01 * point["intensity"] * roofs["bytes_per_cycle"], point


def test_predicted_and_simulated_times_agree(tmp_path):
    model = random_model(3, kinds=("q4_1",))
    compiled = compile_model(model, CONFIG, 32)
    found = []
    for device in ("rtl", "functional"):
        accelerator = open_profiled(device, compiled, lambda line: None)
        with accelerator.device:
            list(accelerator.generate(PROMPT, COUNT))
        found.append(accelerator.recordings)
    real, predicted = (analysis.breakdown(recordings) for recordings in found)
    assert [recordings[0].label for recordings in found] == ["simulated", "predicted"]
    total = sum(real.values())
    assert sum(predicted.values()) == pytest.approx(total, rel=0.02)
    for cause in analysis.CAUSES:
        assert abs(predicted[cause] - real[cause]) <= 0.02 * total, cause


class Page(html.parser.HTMLParser):
    """Open tags, ids, text and references of a page; a tag that closes another than the last open one is an error."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.tags, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        if "id" in values and tag == "figure":
            self.ids.append(values["id"])
        self.references += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag) if tag not in self.VOID else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_page_that_needs_nothing_else(profiled):
    folder, accelerator, found = profiled
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and page.ids == list(FIGURES) and page.tags.count("svg") == len(FIGURES)
    assert "script" not in page.tags
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert not re.search(r"url\((?!#)|@import", text)
    seen = " ".join(page.text)
    assert "a <small> model" in seen and f"({accelerator.recordings[0].label})" in seen
    assert found["costliest"][0]["text"] in seen
    assert f"{found['breakdown']['memory']:,}" in seen


def test_figures_are_whole_pictures(profiled):
    folder, *_ = profiled
    pictures = re.findall(r'<figure id="(\w+)">(<svg.*?</svg>)', (folder / "report.html").read_text(), re.DOTALL)
    assert [name for name, _ in pictures] == list(FIGURES)
    for name, picture in pictures:
        paths = [item for item in ElementTree.fromstring(picture).iter() if item.tag.endswith("}path")]
        assert sum(bool(item.get("d")) for item in paths) > 10, name


def test_a_browser_shows_the_report_without_complaint(profiled, tmp_path):
    """Chromium, where it is installed; elsewhere there must be nothing that could complain: no script, no reference."""
    folder, *_ = profiled
    report = folder / "report.html"
    text = report.read_text()
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        page, ids = Page(text), set(re.findall(r'id="([^"]+)"', text))
        assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags) and "onload" not in text
        assert {item[1:] for item in page.references if item.startswith("#")} <= ids
        return
    shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                            f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom", report.as_uri()],
                           capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr, shown.stderr
    page = Page(shown.stdout)
    assert page.ids == list(FIGURES) and page.tags.count("svg") == len(FIGURES)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["profile", *map(str, arguments)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_command_writes_the_folder(capsys, tmp_path):
    write_gguf(random_model(5, kinds=("q4_1",)), tmp_path / "m.gguf")
    code, out, _ = run(capsys, "-m", tmp_path / "m.gguf", "--prompt-tokens", "1,2,3", "-n", 2, "--config", "tiny",
                       "--memory", "hbm", "-o", tmp_path / "out")
    assert code == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert re.search(r"^[\d,]+ cycles in 2 runs \(predicted\): memory \d", out, re.MULTILINE)
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["facts"]["memory"] == "hbm" and found["labels"]["cycles"] == "predicted"
    assert np.isfinite(found["cycles"])


@pytest.mark.parametrize("arguments, message", [
    (["--device", "reference"], "skipopu: the reference has no instructions to profile; use --device functional or "),
    (["--memory", "ddr"], "skipopu: memory must be ideal or hbm, not 'ddr'"),
    (["--device", "gpu"], "skipopu: unknown device 'gpu'"),
])
def test_command_answers_mistakes_in_one_line(capsys, tmp_path, arguments, message):
    write_gguf(random_model(5, kinds=("q4_1",)), tmp_path / "m.gguf")
    code, out, err = run(capsys, "-m", tmp_path / "m.gguf", "--prompt-tokens", "1", "--config", "tiny", "-o",
                         tmp_path / "out", *arguments)
    assert (code, out) == (1, "") and err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()

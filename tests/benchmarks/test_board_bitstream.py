"""The benchmark of the board's bitstream judges a report and an image; the flow itself has tests on a small design."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import board  # noqa: E402

REPORT = {"config": "ulx3s", "seed": 1, "clock_mhz": 25.0, "fmax_mhz": 27.0, "margin": 0.08, "bitstream": "x.bit",
          "utilisation": {"LUT4": {"used": 50, "available": 100}},
          "seconds": {"synthesis": {"wall": 5000.0, "processor": 300.0}, "packing": {"wall": 9.0, "processor": 8.0}}}
IMAGE = b"\xff\x00" + bytes(300_000)


def judge(monkeypatch, tmp_path, capsys, report, image):
    def build(config, directory, *, seed, log):
        log("a step")
        assert (config.name, seed) == ("ulx3s", 3)
        Path(directory, report["bitstream"]).write_bytes(image)
        return report

    monkeypatch.setattr(board.ulx3s, "build", build)
    monkeypatch.setattr(sys, "argv", ["board.py", "--seed", "3", "-o", str(tmp_path)])
    return board.main(), capsys.readouterr().out


def test_targets_that_are_met(monkeypatch, tmp_path, capsys):
    failed, out = judge(monkeypatch, tmp_path, capsys, REPORT, IMAGE)
    assert not failed and "MISSED" not in out and out.count(" met ") == 5
    assert "seconds, wall" in out and "5,009" in out and "308" in out and "50.0%" in out


@pytest.mark.parametrize("changes, image", [
    ({"margin": 0.04}, IMAGE), ({"fmax_mhz": 24.9}, IMAGE), ({}, b"\xff\x00"), ({}, bytes(400_000)),
    ({"seconds": {"synthesis": {"wall": 600.0, "processor": 1201.0}}}, IMAGE)],
    ids=["margin", "clock", "short", "no header", "time"])
def test_each_target_can_be_missed(monkeypatch, tmp_path, capsys, changes, image):
    failed, out = judge(monkeypatch, tmp_path, capsys, REPORT | changes, image)
    assert failed and out.count("MISSED") == 1


def test_mistakes_are_one_line():
    done = subprocess.run([sys.executable, board.__file__, "--config", "huge"], capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 1 and done.stderr.startswith("error: unknown configuration 'huge'")

"""``skipopu bitstream``: what it prints, and one line for what cannot be."""

import json

import pytest
from skipopu.bitstream import ecp5, ulx3s
from skipopu.host.cli import main
from skipopu.sim.toolchain import ToolError

REPORT = {"utilisation": {"LUT4": {"used": 50, "available": 100}}, "fmax_mhz": 30.0, "clock_mhz": 25.0,
          "slack_ns": 6.67, "margin": 0.2, "bitstream": "x.bit",
          "seconds": {"synthesis": {"wall": 123.0, "processor": 45.0}}}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["bitstream", *arguments])
    return stop.value.code, *capsys.readouterr()


def test_an_unknown_board_lists_the_known_ones(capsys):
    code, _, err = run(capsys, "--board", "ulx3s", "-o", "x")
    assert code == 1
    assert err == "skipopu: unknown board 'ulx3s', did you mean 'ulx3s-85f'?; known for bitstream: ulx3s-85f\n"


def test_an_unknown_configuration(capsys):
    code, _, err = run(capsys, "--board", "ulx3s-85f", "--config", "huge", "-o", "x")
    assert code == 1 and err.startswith("skipopu: unknown configuration 'huge'; known: ") and err.count("\n") == 1


@pytest.mark.parametrize("error", [ToolError("nextpnr-ecp5 not found: …"), ecp5.TimingError("x reaches 20 MHz")])
def test_what_the_flow_refuses_is_one_line(capsys, monkeypatch, error):
    def build(*_, **__):
        raise error

    monkeypatch.setattr(ulx3s, "build", build)
    assert run(capsys, "--board", "ulx3s-85f", "-o", "x") == (1, "", f"skipopu: {error}\n")


def test_the_report_is_printed(capsys, monkeypatch):
    taken = {}

    def build(config, directory, *, seed, log):
        taken.update(config=config.name, directory=directory, seed=seed)
        log("a step")
        return REPORT

    monkeypatch.setattr(ulx3s, "build", build)
    code, out, _ = run(capsys, "--board", "ulx3s-85f", "-o", "there", "--seed", "7")
    assert code == 0 and taken == {"config": "ulx3s", "directory": "there", "seed": 7}
    assert "LUT4" in out and "50.0% (estimated)" in out and "30.0 MHz for 25 MHz, slack 6.67 ns, margin 20.0%" in out
    assert "there/x.bit: configuration ulx3s" in out
    assert "synthesis                    123 s, 45 s of a processor (measured)" in out
    code, out, _ = run(capsys, "--board", "ulx3s-85f", "-o", "there", "--json")
    assert code == 0 and json.loads(out) == REPORT

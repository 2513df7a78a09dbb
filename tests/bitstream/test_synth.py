"""Resources are counted completely, repeated modules once, results come from the cache, and mistakes are one line."""

import json
import re
from collections import Counter
from fractions import Fraction

import pytest
from amaranth.hdl import Cat, Instance, Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from skipopu.bitstream import synth
from skipopu.bitstream.blocks import BLOCKS
from skipopu.bitstream.synth import TARGETS, Resources, SynthesisError, resources, share_modules, synthesise
from skipopu.host.cli import main
from skipopu.hw.blocks.dsp import Dsp48e2
from skipopu.hw.config import PRESETS
from skipopu.hw.verilog import YosysError, to_rtlil

XCUP, ECP5 = TARGETS["xcup"], TARGETS["ecp5"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIPOPU_CACHE", str(tmp_path / "cache"))


class Adder(wiring.Component):
    def __init__(self, width=8, product=False):
        self.product = product
        super().__init__({"a": In(signed(width)), "b": In(signed(width)), "y": Out(signed(width))})

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.y.eq(self.a * self.b if self.product else self.a + self.b)
        return m


class Chain(wiring.Component):
    """``count`` adders, in groups of three."""

    def __init__(self, count, different=False):
        self.count, self.different = count, different
        super().__init__({"a": In(signed(8)), "b": In(signed(8)), "y": Out(signed(8))})

    def elaborate(self, platform):
        m = Module()
        value = self.a
        for index in range(self.count):
            m.submodules[f"unit{index}"] = unit = Chain(3) if self.count > 3 else Adder()
            m.d.comb += [unit.a.eq(value), unit.b.eq(self.b ^ index if self.different else self.b)]
            value = unit.y
        m.d.comb += self.y.eq(value)
        return m


class Foreign(wiring.Component):
    """An instance of a cell type, all of its ports left open."""

    def __init__(self, kind):
        self.kind = kind
        super().__init__({"y": Out(1)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.cell = Instance(self.kind, o_CLKO=self.y)
        return m


class Store(wiring.Component):
    """A memory with one write port and one read port."""

    def __init__(self, width, depth, domain):
        self.memory, self.domain = Memory(shape=width, depth=depth, init=[]), domain
        super().__init__({"write": In(range(depth)), "data": In(width), "en": In(1), "read": In(range(depth)),
                          "q": Out(width)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = self.memory
        write, read = self.memory.write_port(), self.memory.read_port(domain=self.domain)
        m.d.comb += [write.addr.eq(self.write), write.data.eq(self.data), write.en.eq(self.en), read.addr.eq(self.read),
                     self.q.eq(read.data)]
        return m


def cost(component, on=XCUP):
    return resources(synthesise(component, on), on)


class Together(wiring.Component):
    """Components side by side."""

    def __init__(self, *components):
        self.components = components
        super().__init__({f"part{index}": Out(component.signature) for index, component in enumerate(components)})

    def elaborate(self, platform):
        m = Module()
        for index, component in enumerate(self.components):
            m.submodules[f"part{index}"] = component
            wiring.connect(m, wiring.flipped(getattr(self, f"part{index}")), component)
        return m


def test_small_circuits_count_as_expected():
    mixed = cost(Together(Adder(), Dsp48e2(target="dsp48e2"), Store(16, 32, "comb"), Store(36, 2048, "sync"),
                          Store(72, 8192, "sync")))
    assert (mixed.carries, mixed.dsps, mixed.bram36, mixed.uram) == (2, 1, 2, 2)
    assert mixed.ffs >= 8 and 16 <= mixed.lutram_luts <= 32 and mixed.luts >= 8 + mixed.lutram_luts


def test_small_circuits_count_as_expected_on_ecp5():
    adder = cost(Adder(), ECP5)
    assert (adder.ffs, adder.luts, adder.carries) == (8, 8, 4)
    assert cost(Adder(16, product=True), ECP5).dsps == 1
    assert cost(Store(4, 16, "comb"), ECP5) == Resources(luts=6, lutram_luts=6)
    assert cost(Store(18, 2048, "sync"), ECP5).bram18 == 2


def test_repeated_modules_cost_as_often_as_they_occur(monkeypatch):
    monkeypatch.setattr(synth, "_WORTH", 0)
    one, many = cost(Adder(), ECP5), cost(Chain(4), ECP5)
    assert many == one.times(12)
    monkeypatch.setattr(synth, "_REPEATED", 1000)  # flattened
    assert cost(Chain(4), ECP5) == many


def test_equal_modules_become_one_and_keep_their_boundary(monkeypatch):
    monkeypatch.setattr(synth, "_WORTH", 0)
    text = to_rtlil(Chain(4), name="top")
    shared = share_modules(text)
    assert text.count("\nmodule ") == 1 + 4 + 12 and shared.count("\nmodule ") == 3
    assert shared.count("keep_hierarchy 1") == 2 and shared.count("  cell \\top") == 3 + 4
    monkeypatch.setattr(synth, "_WORTH", 10_000)
    assert "keep_hierarchy" not in share_modules(text)


class Enabled(wiring.Component):
    """``count`` delays; no signal has their enables, so that Amaranth numbers the ports."""

    def __init__(self, count):
        self.count = count
        super().__init__({"en": In(1).array(count, 2), "a": In(8).array(count), "y": Out(8).array(count)})

    def elaborate(self, platform):
        m = Module()
        for index in range(self.count):
            m.submodules[f"unit{index}"] = unit = Delay()
            m.d.comb += [unit.a.eq(self.a[index]), self.y[index].eq(unit.y),
                         unit.en.eq(Cat(self.en[index][bit] & self.a[index][bit] for bit in range(2)))]
        return m


class Delay(wiring.Component):
    """Two registers with an enable each."""

    en: In(2)
    a: In(8)
    y: Out(8)

    def elaborate(self, platform):
        m = Module()
        first = Signal(8)
        with m.If(self.en[0]):
            m.d.sync += first.eq(self.a)
        with m.If(self.en[1]):
            m.d.sync += self.y.eq(first)
        return m


def test_modules_are_equal_whatever_number_amaranth_gives_their_ports(monkeypatch):
    monkeypatch.setattr(synth, "_WORTH", 0)
    text = to_rtlil(Enabled(4), name="top")
    named = re.compile(r"^    connect (\\port\S*) (.*)", re.M)
    before, shared = named.findall(text), share_modules(text)
    assert len({port for port, _ in before}) == 8 and shared.count("\nmodule ") == 2
    assert named.findall(shared) == [(f"\\port${index % 2}", value) for index, (_, value) in enumerate(before)]


@pytest.mark.parametrize("depth, cells", [(256, {"RAM256X1S": 3}), (512, {"RAM512X1S": 3}), (1024, {"RAM512X1S": 6})])
def test_memories_with_one_address_get_a_cell_that_exists(depth, cells):
    class OneAddress(wiring.Component):
        en: In(1)
        at: In(range(depth))
        data: In(3)
        y: Out(3)

        def elaborate(self, platform):
            m = Module()
            m.submodules.memory = memory = Memory(shape=3, depth=depth, init=[])
            read, write = memory.read_port(domain="comb"), memory.write_port()
            m.d.comb += [read.addr.eq(self.at), write.addr.eq(self.at), write.en.eq(self.en), write.data.eq(self.data),
                         self.y.eq(read.data)]
            return m

    found = synthesise(OneAddress(), XCUP)
    assert {name: count for name, count in found.items() if name.startswith("RAM")} == cells


def test_a_result_comes_from_the_cache_until_something_differs():
    def stages(component):
        said = []
        return synthesise(component, ECP5, name="it", log=said.append), said

    first, said = stages(Adder())
    assert said[0] == "it: elaborating" and "it: map_luts" in said
    again, said = stages(Adder())
    assert again == first and said == ["it: elaborating"]
    assert "it: map_luts" in stages(Adder(9))[1]


def test_parts_of_a_whole_are_rounded_up():
    assert Resources(luts=10, ffs=3).times(Fraction(1, 4)) == Resources(luts=3, ffs=1)
    assert Resources(luts=10).times(3) + Resources(luts=1, dsps=2) == Resources(luts=31, dsps=2)


def test_unknown_cells_are_refused():
    with pytest.raises(SynthesisError, match=r"xcup has no cells \$mul, BUFG: the design is not mapped completely"):
        resources(Counter({"LUT2": 1, "BUFG": 1, "$mul": 2}), XCUP)
    with pytest.raises(SynthesisError, match="ecp5 has no cells DCCA"):
        cost(Foreign("DCCA"), ECP5)


def test_what_yosys_refuses_is_one_line():
    with pytest.raises(YosysError, match=r"^yosys failed on it: [^\n]*NO_SUCH_CELL[^\n]*$"):
        synthesise(Foreign("NO_SUCH_CELL"), ECP5, name="it")


def run(capsys, *options):
    with pytest.raises(SystemExit) as ended:
        main(["synth", *options])
    done = capsys.readouterr()
    return ended.value.code, done.out, done.err


def test_command_prints_json(capsys):
    code, out, _ = run(capsys, "--block", "baseline", "--config", "tiny", "--json")
    report = json.loads(out)
    assert code == 0 and report["block"] == "baseline" and report["config"] == "tiny" and report["target"] == "xcup"
    assert report["dsps"] == report["products_per_cycle"] == 8
    assert report["luts_per_product"] == report["luts"] / 8 > 100
    assert report["ffs"] > 500 and report["carries"] > 50 and set(report["rams"]) >= {"bram36", "uram", "lutram_luts"}
    assert "estimated" in report["labels"]["luts"]


def test_command_compares_the_unit_with_the_baseline(capsys):
    unit = ("--block", "pe-unit", "--config", "tiny", "--target", "ecp5")
    code, out, _ = run(capsys, *unit, "--json")
    report = json.loads(out)
    assert code == 0 and report["products_per_cycle"] == 16
    assert report["luts_per_product"] == report["luts"] / 16 and report["baseline_luts_per_product"] > 100
    assert 0 < report["error_mean_relative"] < 1e-3 and 0 < report["baseline_error_mean_relative"] < 1e-3
    text = run(capsys, *unit)[1]
    assert "16 products per cycle" in text and "conventional FP16" in text and "mean relative error" in text


@pytest.mark.parametrize(("options", "message"), [
    (["--block", "pe"], f"unknown block 'pe'; known: {', '.join(BLOCKS)}"),
    (["--block", "align", "--target", "ice40"], "unknown target 'ice40'; known: xcup, ecp5"),
    (["--block", "align", "--config", "huge"], f"unknown configuration 'huge'; known: {', '.join(PRESETS)}"),
])
def test_command_names_what_is_known(capsys, options, message):
    assert run(capsys, *options) == (1, "", f"skipopu: {message}\n")


@pytest.mark.parametrize("name", ["align", "mbuf", "kvbuf", "load", "store"])
def test_every_block_elaborates(name):
    for part in BLOCKS[name].parts(PRESETS["tiny"], "xcup"):
        assert "module \\synth_top" in to_rtlil(part.make(), name="synth_top"), part.name


"""Resources of a whole configuration, block by block, as shares of a device: `skipopu synth` without a block.

Each block is synthesised by itself, what occurs many times in it once, and the blocks are added up: minutes instead of
the hours that one netlist of a large configuration would take. What Yosys could share or drop between blocks is
therefore counted; so the sum is an upper estimate of its own result.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from amaranth.hdl import DomainRenamer, Module
from amaranth.lib import wiring
from skipopu.hw.blocks.array import ColumnPair, at_once
from skipopu.hw.blocks.compute import ComputeUnit
from skipopu.hw.blocks.control import Control
from skipopu.hw.blocks.crossing import PortCrossing
from skipopu.hw.blocks.csr import Csr
from skipopu.hw.blocks.fetch import Fetch
from skipopu.hw.blocks.kvbuf import KvBuffer
from skipopu.hw.blocks.load import LoadUnit
from skipopu.hw.blocks.mbuf import MantissaBuffer
from skipopu.hw.blocks.store import StoreUnit
from skipopu.hw.blocks.vector import VectorUnit
from skipopu.hw.config import OverlayConfig, preset
from skipopu.hw.kernel import FETCH_BITS

from .blocks import for_target
from .boards import ALVEO
from .synth import Resources, resources, synthesise, target

__all__ = ["PAPER", "lines", "whole"]

#: Shares of the device that SkipOPU reports for the U280 (arXiv 2603.14785, Table 2).
PAPER = {"LUT": 0.9885, "FF": 0.6399, "DSP": 0.5117, "URAM": 0.5333}
_COLUMNS = {  # of a target: what a column counts
    "xcup": {"LUT": lambda cost: cost.luts, "FF": lambda cost: cost.ffs, "DSP": lambda cost: cost.dsps,
             "BRAM36": lambda cost: cost.bram36 + (cost.bram18 + 1) // 2, "URAM": lambda cost: cost.uram},
    "ecp5": {"LUT": lambda cost: cost.luts, "FF": lambda cost: cost.ffs, "MULT18": lambda cost: cost.dsps,
             "EBR": lambda cost: cost.bram18},
}


@dataclass(frozen=True)
class _Block:
    """``count`` components of a configuration, synthesised once; ``within`` : a block that already counts them."""

    title: str
    make: Callable[[OverlayConfig], wiring.Component]
    count: Callable[[OverlayConfig], int] = lambda config: 1
    within: str | None = None


class _Crossing(wiring.Component):
    """A crossing with both of its sides on one clock: it costs the same."""

    def __init__(self, **options):
        self._crossing = PortCrossing(**options)
        super().__init__(self._crossing.signature)

    def elaborate(self, platform):
        m = Module()
        m.submodules.crossing = DomainRenamer({"memory": "sync"})(self._crossing)
        for name in self.signature.members:
            wiring.connect(m, wiring.flipped(getattr(self, name)), getattr(self._crossing, name))
        return m


def _crossing(config, **options):
    board = next(iter(ALVEO.values()))
    bits = FETCH_BITS if options else config.port_bits
    return _Crossing(core_bits=bits, memory_bits=min(board.memory_bits, bits), memory_burst=board.memory_burst,
                     **options)


_BLOCKS = [
    _Block("array, weight stream, activations", lambda config: ComputeUnit(config=config)),
    _Block("two columns", lambda config: ColumnPair(config=config), lambda config: at_once(config) // 2,
           "array, weight stream, activations"),
    _Block("activations", lambda config: MantissaBuffer(config=config), within="array, weight stream, activations"),
    _Block("vector unit", lambda config: VectorUnit(config=config)),
    _Block("keys and values", lambda config: KvBuffer(config=config)),
    _Block("memory reads", lambda config: LoadUnit(config=config)),
    _Block("memory writes", lambda config: StoreUnit(config=config)),
    _Block("control", lambda config: Control(config=config)),
    _Block("instruction fetch", lambda config: Fetch(config=config)),
    _Block("registers and counters", lambda config: Csr(config=config)),
]
_KERNEL = [  # what the kernel for Alveo cards has besides
    _Block("clock crossings of the memory ports", _crossing, lambda config: config.ports),
    _Block("clock crossing of the instruction fetch", lambda config: _crossing(config, outstanding=8, write=False)),
]


def whole(config_name, target_name, log=None):
    """One JSON-able dict: every block's counts, the sum, and shares of the device beside the paper's.

    log : called with what is being done, when it begins
    Raises SynthesisError, ConfigError for unknown names, YosysError for a design that Yosys refuses.
    """
    on = target(target_name)
    config = for_target(preset(config_name), on.name)
    begin, total, blocks = time.perf_counter(), Resources(), []
    for block in [*_BLOCKS, *(_KERNEL if config_name in {board.config for board in ALVEO.values()} else [])]:
        count = block.count(config)
        cost = resources(synthesise(block.make(config), on, name=block.title, log=log), on).times(count)
        if block.within is None:
            total += cost
        blocks.append({"name": block.title, "count": count, "within": block.within, **_counts(cost, on)})
    found = _counts(total, on)
    return {"config": config.name, "target": on.name, "device": on.part, "blocks": blocks, "total": found,
            "available": _counts(on.available, on), "shares": {
                name: count / _counts(on.available, on)[name] for name, count in found.items()},
            "paper": PAPER if on.name == "xcup" else {}, "seconds": time.perf_counter() - begin, "labels": {
                **dict.fromkeys(("blocks", "total", "shares"), f"estimated by yosys for {on.device}, before placement, "
                                "block by block"), "paper": "reported by SkipOPU", "seconds": "measured"}}


def _counts(cost, on):
    return {name: column(cost) for name, column in _COLUMNS[on.name].items()}


def lines(report):
    """The report for people, line by line."""
    names = list(report["total"])
    width = max(len(_title(block)) for block in report["blocks"])

    def row(title, cells):
        return f"{title:{width}} " + " ".join(f"{cell:>11}" for cell in cells)

    yield f"{report['config']} on {report['device']} (estimated)"
    yield row("", names)
    for block in report["blocks"]:
        yield row(_title(block), [f"{block[name]:,}" for name in names])
    yield row("sum", [f"{report['total'][name]:,}" for name in names])
    yield row("device", [f"{report['available'][name]:,}" for name in names])
    yield row("share", [f"{report['shares'][name]:.2%}" for name in names])
    if report["paper"]:
        yield row("SkipOPU on the U280 (reported)", [f"{report['paper'][name]:.2%}" if name in report["paper"] else "-"
                                                     for name in names])


def _title(block):
    times = f"{block['count']} x " if block["count"] > 1 else ""
    return f"  of which {times}{block['name']}" if block["within"] else f"{times}{block['name']}"

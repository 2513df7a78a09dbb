"""The blocks that can be synthesised by themselves: name, parts, and what they compute per cycle.

A part that a block shares with others counts as a fraction: what the alignment of a row costs is spread over the
columns that it serves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from amaranth.lib.wiring import Component
from skipopu.hw.blocks.align import BlockAlign
from skipopu.hw.blocks.array import ColumnPair, at_once
from skipopu.hw.blocks.compute import ComputeUnit
from skipopu.hw.blocks.control import Control
from skipopu.hw.blocks.kvbuf import KvBuffer, KvShift
from skipopu.hw.blocks.kvintake import KvLargest
from skipopu.hw.blocks.load import LoadUnit
from skipopu.hw.blocks.mbuf import MantissaBuffer
from skipopu.hw.blocks.store import StoreUnit
from skipopu.hw.blocks.vector import VectorUnit
from skipopu.hw.config import OverlayConfig
from skipopu.hw.top import Overlay

from .baseline import HalfDot
from .pe_unit import PeUnit
from .synth import SynthesisError

__all__ = ["BLOCKS", "Block", "Part", "block", "for_target"]


@dataclass(frozen=True)
class Part:
    """``count`` components as ``make`` makes them, synthesised once."""

    count: int | Fraction
    name: str
    make: Callable[[], Component]


@dataclass(frozen=True)
class Block:
    """What ``--block`` names."""

    about: str
    parts: Callable[[OverlayConfig, str], list[Part]]  #: of a configuration and a target
    products: Callable[[OverlayConfig], int] | None = None  #: multiplications per cycle, where that is its purpose


def for_target(config, target):
    """The configuration with the multipliers of a target."""
    return replace(config, dsp={"xcup": "dsp48e2", "ecp5": "mult18x18d"}[target])


def _slices(target):
    """How the packed lanes are described for a target."""
    return "dsp48e2" if target == "xcup" else "generic"


def _alignment(config, share):
    """Both operands' way to a common exponent at the array's full rate, of which this is one ``share``-th."""
    return [
        Part(Fraction(config.blocks, share), "activations to a block's exponent", lambda: BlockAlign(config.block)),
        Part(Fraction(config.ports, share), "largest exponent of keys and values",
             lambda: KvLargest(elements=config.beat_elements)),
        Part(Fraction(config.ports, share), "keys and values to that exponent",
             lambda: KvShift(elements=config.beat_elements, narrow=False)),  # FP16, as the baseline takes it
    ]


def _unit(config, target):
    dsp = for_target(config, target).dsp
    return [Part(1, "two dot products", lambda: PeUnit(lanes=config.lanes, block=config.block, dsp=dsp)),
            *_alignment(config, config.columns // 2)]


def _array(config, target):
    return [Part(at_once(config) // 2, "two columns", lambda: ColumnPair(config=for_target(config, target)))]


def _whole(component):
    return lambda config, target: [Part(1, component.__name__, lambda: component(config=config))]


BLOCKS = {
    "pe-unit": Block("dot products of two columns, aligned at the edge, exact inside, reconstructed once", _unit,
                     lambda config: 2 * config.lanes),
    "pe-array": Block("all columns of the array with their accumulators", _array,
                      lambda config: config.lanes * at_once(config)),
    "baseline": Block("dot product of conventional FP16 multipliers and adders, for comparison",
                      lambda config, target: [
                          Part(1, "dot product", lambda: HalfDot(lanes=config.lanes, target=_slices(target)))],
                      lambda config: config.lanes),
    "align": Block("alignment of one block of activations",
                   lambda config, target: [Part(1, "BlockAlign", lambda: BlockAlign(config.block))]),
    "mbuf": Block("buffer of aligned activations", _whole(MantissaBuffer)),
    "kvbuf": Block("buffer of keys and values, with their alignment", _whole(KvBuffer)),
    "vector": Block("vector unit", _whole(VectorUnit)),
    "compute": Block("array with its weight stream and tiles", _whole(ComputeUnit)),
    "load": Block("memory reads", _whole(LoadUnit)),
    "store": Block("memory writes", _whole(StoreUnit)),
    "control": Block("instruction fetch, hazards, issue, registers", _whole(Control)),
    "overlay": Block("everything", _whole(Overlay)),
}


def block(name):
    """The block of that name; SynthesisError lists the known ones."""
    try:
        return BLOCKS[name]
    except KeyError:
        raise SynthesisError(f"unknown block {name!r}; known: {', '.join(BLOCKS)}") from None

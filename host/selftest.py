"""Find out what works on a device, part by part: registers, memory, array, nonlinear functions, one layer.

Where there is something to compute, a small random model runs on the device and on the bit-exact functional level, both
stopped after the same instruction, and the rows written until then are compared. A check that fails says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import Access, registers

from .compare import compare
from .compiled import Compiled
from .compiler import compile_model
from .device import Device, read_register, write_register
from .devices import open_device
from .effects import Effect, run_effects
from .errors import DeviceError
from .passes.walk import Arguments
from .runtime import Accelerator

__all__ = ["CHECKS", "Check", "Selftest"]

_SEED = 20
_NONLINEAR = {"vscore", "vprob", "vmerge", "vscale", "vswiglu", "vnorm", "vrope"}
_WIDTHS = {"PROGRAM_LENGTH": 24, "ROUTE_FORCE": 1}  # bits, where not all of a word exist
_LEFT_OUT = {"CTRL", "GIE", "IER", "ISR", "DEBUG_ADDRESS"}  # writing them does something
_WORDS = 256  # of each memory pattern


@dataclass(frozen=True)
class Check:
    """One verdict; ``detail`` says what was found, or what is broken."""

    name: str
    passed: bool
    detail: str

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'BROKEN'} {self.name}: {self.detail}"


class _Broken(Exception):
    """What a check has found."""


class Selftest:
    """The checks of one device, which is opened here with the memory that they need.

    name : of the device; options : of the device
    Raises DeviceError if the device cannot be opened.
    """

    def __init__(self, name: str, config: OverlayConfig, **options: Any) -> None:
        from skipopu.golden.random_model import random_model
        model = random_model(_SEED, layers=1, kinds=("q4_1", "q8_0"))
        self.compiled: Compiled = compile_model(model, config)
        size = self.compiled.map.memory * config.port_bits // 8
        self.device: Device = open_device(name, config, size, **options)
        self._reference = open_device("functional", config, size)
        self.tokens = np.random.default_rng(_SEED).integers(0, model.config.vocab, 6).tolist()

    def run(self) -> Iterator[Check]:
        """Every check in turn. One that fails does not keep the others from running."""
        for name, check in CHECKS.items():
            try:
                yield Check(name, True, check(self))
            except (_Broken, DeviceError) as error:
                yield Check(name, False, str(error))

    def identity(self) -> str:
        """Capability registers against the configuration."""
        self.device.identify()
        config = self.device.config
        return f"configuration {config.name} ({config.config_hash:#010x})"

    def registers(self) -> str:
        """What is written into registers, against what they read afterwards."""
        config, rng = self.device.config, np.random.default_rng(_SEED)
        limits = {"PORT_BASE": config.ports, "TOKEN_TABLE": config.tokens}
        widths = {(item.name, index): _WIDTHS.get(item.name, 32 * item.words) for item in registers().values()
                  if item.access == Access.READ_WRITE and item.name not in _LEFT_OUT
                  for index in range(limits.get(item.name, item.count))}
        values = {where: int.from_bytes(rng.bytes(8), "little") & (1 << bits) - 1 for where, bits in widths.items()}
        opposites = {where: value ^ (1 << widths[where]) - 1 for where, value in values.items()}
        for written in (values, opposites, dict.fromkeys(widths, 0)):  # every bit both ways; zero as a reset leaves it
            for (name, index), value in written.items():
                write_register(self.device, name, value, index)
            for (name, index), value in written.items():
                if (got := read_register(self.device, name, index)) != value:
                    raise _Broken(f"{name}[{index}] holds {got:#x} after {value:#x} was written")
        return f"{len(widths)} registers keep what is written"

    def memory(self) -> str:
        """Patterns at both ends of every port's memory, all written before any is read."""
        device = self.device
        size, beat = device.memory_bytes, device.config.port_bits // 8
        patterns = {}
        for port in range(device.config.ports):
            for place in sorted({0, (size // 2 & -beat) + 3, size - 8 * _WORDS}):
                data = np.arange(_WORDS, dtype="<u8") * 0x9E3779B97F4A7C15 + (port << 56 | place)
                patterns[port, place] = data.view(np.uint8)
        for (port, place), data in patterns.items():
            device.write_memory(port, place, data)
        for (port, place), data in patterns.items():
            got = device.read_memory(port, place, len(data))
            if (wrong := np.flatnonzero(got != data)).size:
                at = int(wrong[0])
                raise _Broken(f"port {port} byte {place + at:#x} holds {got[at]:#04x}, not {data[at]:#04x}; "
                              f"{wrong.size} of {len(data)} bytes are wrong")
        return f"{len(patterns)} patterns on {device.config.ports} ports of {size:,} bytes"

    def array(self) -> str:
        """The first product of activations with weights, as it leaves the array."""
        return self._until(lambda effects: 1 + next(
            index for index, effect in enumerate(effects) if index and effects[index - 1].mnemonic == "matmul"))

    def nonlinear(self) -> str:
        """Everything up to the last nonlinear function of the layer: norm, rotation, softmax, SwiGLU."""
        return self._until(lambda effects: 1 + max(
            index for index, effect in enumerate(effects) if effect.mnemonic in _NONLINEAR))

    def layer(self) -> str:
        """A prompt and three tokens through the whole model: keys, values, logits and tokens."""
        for result in compare(*self._pair(), self.tokens, 3):
            if result.difference is not None:
                raise _Broken(str(result.difference))
        return f"{result.runs} runs, {result.logits} logits and {len(result.generated)} tokens equal"

    def _pair(self) -> tuple[Accelerator, Accelerator]:
        self.device.reset()
        expected, got = (Accelerator(device, self.compiled) for device in (self._reference, self.device))
        return expected, got

    def _until(self, count: Callable[[Sequence[Effect]], int]) -> str:
        """Run as many instructions as ``count`` says of a run's effects, and compare every row that they write."""
        program, config, pair = self.compiled.program, self.device.config, self._pair()
        tokens = self.tokens[: min(2, config.tokens)]
        effects = run_effects(config, program, Arguments(0, len(tokens), 0, len(tokens)), tokens)
        effects = effects[: count(effects)]
        for accelerator in pair:
            accelerator.run(tokens, 0, len(tokens), instructions=len(effects))
        last = {(buffer, int(row)): effect for effect in effects for buffer, rows in effect.rows.items()
                for row in rows}  # of several instructions that write a row, the last one shows
        for (buffer, row), effect in last.items():
            expected, got = (np.frombuffer(item.device.inspect(buffer, row), "<u2") for item in pair)
            if (wrong := np.flatnonzero(expected != got)).size:
                at = int(wrong[0])
                raise _Broken(f"{buffer.name} row {row} half-word {at} is {got[at]:#06x}, not {expected[at]:#06x}, "
                              f"after {program.describe(effect.pc)}")
        return f"{len(last)} rows equal after {len(effects)} instructions"


CHECKS: dict[str, Callable[[Selftest], str]] = {
    "identity": Selftest.identity, "registers": Selftest.registers, "memory": Selftest.memory,
    "array": Selftest.array, "nonlinear": Selftest.nonlinear, "layer": Selftest.layer,
}  #: by name, in their order

"""The functional machine behind the device interface: what the runtime drives when no hardware is there."""

from __future__ import annotations

import numpy as np
from skipopu.host.errors import DeviceError
from skipopu.host.software_device import Outcome, Run, SoftwareDevice
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import DebugBuffer, FaultCause

from .functional import FunctionalMachine, MachineFault

__all__ = ["FunctionalDevice"]

_READ = ("weights_read", "kv_read", "activations_read")
_WRITTEN = ("kv_written", "logits_written")


class FunctionalDevice(SoftwareDevice):
    """Bit-exact results and byte counts; cycle counters read zero. ``machine`` is the FunctionalMachine inside."""

    def __init__(self, config: OverlayConfig, memory_bytes: int) -> None:
        super().__init__(config, memory_bytes)
        self.machine = FunctionalMachine(config, self.memories)
        self._shared = False  # somebody holds a memory and may have changed it

    def memory(self, port: int) -> np.ndarray | None:
        self._shared = True
        return super().memory(port)

    def write_memory(self, port: int, address: int, data: np.ndarray) -> None:
        super().write_memory(port, address, data)
        self.machine.invalidate(address, len(data))

    def reset(self) -> None:
        super().reset()
        self.machine.reset()

    def execute(self, run: Run) -> Outcome:
        machine = self.machine
        if self._shared:
            machine.invalidate()
            self._shared = False
        fault = None
        try:
            machine.run(run.program, run.length, args=run.arguments, tokens=list(run.tokens),
                        instruction_limit=run.instruction_limit or None, limit=run.memory_limit)
        except MachineFault as error:
            fault = (FaultCause(error.cause), error.pc, error.port)
        counters = machine.counters
        registers = {"INSTRUCTIONS": counters["instructions"], "SATURATIONS": counters["saturations"], "PC": machine.pc,
                     "ARGMAX_INDEX": machine.argmax_index, "ARGMAX_VALUE": machine.argmax_value}
        return Outcome(registers=registers, fault=fault, beats_read=self._beats(_READ),
                       beats_written=self._beats(_WRITTEN))

    def _beats(self, names: tuple[str, ...]) -> int:
        """Beats of all ports together."""
        return sum(self.machine.counters[name] for name in names) * 8 // self.config.port_bits

    def debug_row(self, buffer: DebugBuffer, row: int) -> np.ndarray:
        rows = {DebugBuffer.ABUF: self.machine.abuf, DebugBuffer.MBUF: self.machine.mbuf,
                DebugBuffer.KVOUT: self.machine.kvout}[buffer]
        if row >= len(rows):
            raise DeviceError(f"{buffer.name} has rows 0..{len(rows) - 1}, not {row}")
        return rows[row]

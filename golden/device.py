"""The functional level behind the Device interface."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skipopu.host.errors import DeviceError
from skipopu.host.software_device import Outcome, Run, SoftwareDevice
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import DebugBuffer

from .functional import FunctionalMachine, MachineFault

__all__ = ["FunctionalDevice"]


class FunctionalDevice(SoftwareDevice):
    """A `FunctionalMachine` with registers. It has no clock: counters of cycles read 0.

    machine : the machine itself, for its buffers and its observer
    threads, cache_bytes : see `FunctionalMachine`; memories : see `SoftwareDevice`
    """

    def __init__(self, config: OverlayConfig, memory_bytes: int, threads: int = 1, cache_bytes: int = 2 << 30,
                 memories: Sequence[np.ndarray] | None = None) -> None:
        super().__init__(config, memory_bytes, memories)
        self.machine = FunctionalMachine(config, self.memories, threads, cache_bytes)

    def reset(self) -> None:
        super().reset()
        self.machine.reset()

    def memory(self, port: int) -> np.ndarray:
        """The memory itself. Ask for it anew before writing after a run: that forgets what the machine has unpacked."""
        self.machine.invalidate()
        return self.memories[port]

    def write_memory(self, port: int, address: int, data: np.ndarray) -> None:
        super().write_memory(port, address, data)
        self.machine.invalidate(address, len(data))

    def debug_row(self, buffer: DebugBuffer, row: int) -> np.ndarray:
        """ABUF: FP32. KVOUT: FP16. MBUF: 16-bit mantissas, then the blocks' exponents and sums of 32 bits each."""
        machine = self.machine
        rows = len(getattr(machine, buffer.name.lower()))
        if row >= rows:
            raise DeviceError(f"{buffer.name} has rows 0..{rows - 1}, not {row}")
        if buffer == DebugBuffer.ABUF:
            return machine.abuf[row]
        if buffer == DebugBuffer.KVOUT:
            return machine.kvout[row]
        parts = machine.mbuf[row], machine.mbuf_exponents[row].astype(np.int32), machine.mbuf_sums[row]
        return np.concatenate([part.view(np.uint8) for part in parts])

    def execute(self, run: Run) -> Outcome:
        machine, fault = self.machine, None
        try:
            machine.run(run.program, run.length, run.arguments, run.tokens, run.instruction_limit or None,
                        run.memory_limit, run.forced)
        except MachineFault as error:
            fault = error.cause, error.pc, error.port
        counters, beat, superbeat = machine.counters, self.config.port_bits // 8, self.config.superbeat_bytes
        return Outcome(
            registers={"INSTRUCTIONS": counters["instructions"], "SATURATIONS": counters["saturations"],
                       "DROPPED": counters["dropped"], "WEIGHTS_READ": counters["weights_read"] // superbeat,
                       "KV_READ": counters["kv_read"] // beat, "KV_WRITTEN": counters["kv_written"] // beat,
                       "KV_BUFFERED": counters["kv_buffered"] // beat,
                       "PC": machine.pc, "ARGMAX_INDEX": machine.argmax_index, "ARGMAX_VALUE": machine.argmax_value},
            routes=machine.routes,
            beats_read=sum(counters[name] for name in ("weights_read", "kv_read", "activations_read")) // beat,
            beats_written=(counters["kv_written"] + counters["logits_written"]) // beat, fault=fault)

"""HBM2 behind a port: the parameters of the timing model in `hbm.h`, with their sources.

Ports are 512 bits wide at the core's clock and reach one pseudo-channel each: 256 bits at twice that clock. A model
instance is one pseudo-channel; what reaches it through the switch pays ``switch_ns``, and ``lateral_share`` of the
bandwidth is left when that way is shared.
"""

import ctypes
from dataclasses import dataclass

__all__ = ["HbmConfig", "HbmTiming"]


@dataclass(frozen=True, kw_only=True)
class HbmTiming:
    """One pseudo-channel of a U280. Raises ValueError for a parameter out of range.

    ======================  =========  ======================================================================
    parameter               default    source
    ======================  =========  ======================================================================
    core_mhz                225        SkipOPU 5.1
    memory_mhz              450        AXI clock of 256 bits; 14.4 GB/s (PG276)
    hit_ns                  106.7      idle read latency, row open, switch off (Shuhai, 48 cycles)
    closed_ns, miss_ns      122.2,     row closed, other row open (Shuhai, 55 and 62 cycles)
                            137.8
    column_ns               20         part of ``hit_ns`` between column command and data (assumed)
    row_cycle_ns            45         between two openings of rows in one bank (assumed)
    same_group              2          data slots from access to access in one bank group (tCCD_L / tCCD_S)
    turnaround_ns           15         between reads and writes (assumed)
    refresh_interval_ns     3900       PG276
    refresh_ns              270        refresh with closing the rows: together with opening one again this
                                       gives Shuhai's 13.27 GB/s for a sequential stream
    write_response_ns       50         from the last beat on the bus to the response (assumed)
    switch_ns               0          15.6 with the switch on (Shuhai, 7 cycles), more from far masters
    lateral_share           1.0        0.5 on a lateral connection that two masters use (PG276)
    ======================  =========  ======================================================================
    """

    core_mhz: float = 225
    memory_mhz: float = 450
    hit_ns: float = 106.7
    closed_ns: float = 122.2
    miss_ns: float = 137.8
    column_ns: float = 20
    row_cycle_ns: float = 45
    same_group: float = 2
    turnaround_ns: float = 15
    refresh_interval_ns: float = 3900
    refresh_ns: float = 270
    write_response_ns: float = 50
    switch_ns: float = 0
    lateral_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("core_mhz", "memory_mhz", "hit_ns", "column_ns", "refresh_interval_ns"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 < self.lateral_share <= 1:
            raise ValueError(f"lateral_share must be in (0, 1], not {self.lateral_share}")
        if not self.column_ns <= self.hit_ns <= self.closed_ns <= self.miss_ns:
            raise ValueError(f"latencies must be column <= hit <= closed <= miss, not {self.column_ns}, {self.hit_ns}, "
                             f"{self.closed_ns}, {self.miss_ns}")
        if not 0 <= self.refresh_ns < self.refresh_interval_ns / 2:
            raise ValueError(f"refresh_ns must be 0..{self.refresh_interval_ns / 2}, not {self.refresh_ns}")

    @property
    def peak(self) -> float:
        """Bytes per second of the data bus."""
        return 32e6 * self.memory_mhz

    def native(self, port: int) -> "HbmConfig":
        """What the native model reads; ports refresh one after another, not all at once."""
        slot = 1e6 / self.memory_mhz / self.lateral_share

        def ps(nanoseconds: float) -> int:
            return round(nanoseconds * 1000)

        return HbmConfig(
            enabled=1, core=round(1e6 / self.core_mhz), slot=round(slot),
            path=ps(self.hit_ns - self.column_ns + self.switch_ns) - round(slot), column=ps(self.column_ns),
            activate=ps(self.closed_ns - self.hit_ns), precharge=ps(self.miss_ns - self.closed_ns),
            row_cycle=ps(self.row_cycle_ns), same_group=round((self.same_group - 1) * slot),
            turnaround=ps(self.turnaround_ns), refresh_interval=ps(self.refresh_interval_ns),
            refresh=ps(self.refresh_ns), phase=ps(self.refresh_interval_ns * ((port * 0.618034 + 0.5) % 1)),
            write_response=ps(self.write_response_ns))


class HbmConfig(ctypes.Structure):
    """Mirror of HbmConfig in hbm.h; all zero: ideal memory."""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        "enabled", "core", "slot", "path", "column", "activate", "precharge", "row_cycle", "same_group", "turnaround",
        "refresh_interval", "refresh", "phase", "write_response")]

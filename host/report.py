"""Numbers about a generation, each labelled with where it comes from.

measured : by this machine's clock, or counted; simulated : what the modelled hardware did (cycles, bytes, results);
predicted : computed from a model of cost. Rates of cycles and memory are those of decode, one token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig

from .routers import MODULES
from .runtime import RunStats

__all__ = ["LABELS", "MEMORY", "Timing", "memory_report", "skip_report", "summary_lines"]

MEMORY = ("kv_bytes_written", "weight_bytes_read")  # what skipping saves
LABELS = {
    "seconds": "measured", "prompt_seconds": "measured", "tokens_per_second": "measured", "cycles": "simulated",
    "cycles_per_token": "simulated", "bytes_read": "simulated", "bytes_written": "simulated",
    "bandwidth_efficiency": "simulated", "array_utilisation": "simulated", "skip_attention": "simulated",
    "skip_mlp": "simulated", "kv_bytes_written": "simulated", "weight_bytes_read": "simulated",
}


@dataclass(frozen=True)
class Timing:
    """Seconds on this machine's clock: until the first token, and in all; ``tokens`` generated."""

    first: float
    total: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """seconds, prompt_seconds, tokens_per_second (after the first token; None with fewer than two)."""
        decode = self.total - self.first
        rate = (self.tokens - 1) / decode if self.tokens > 1 and decode > 0 else None
        return {"seconds": self.total, "prompt_seconds": self.first, "tokens_per_second": rate}


def memory_report(stats: Sequence[RunStats], config: OverlayConfig | None) -> dict[str, Any]:
    """Cycles and bytes of a generation; None where the device does not count them.

    stats : runs in order; those of one token behind the prompt's last run (the first with a head) are decode
    cycles, bytes_read, bytes_written, kv_bytes_written, weight_bytes_read : of all runs; cycles_per_token,
    bandwidth_efficiency (bytes moved / (cycles x bytes of all ports)), array_utilisation (cycles in which the array
    multiplied / cycles) : of decode
    """
    keys = ("cycles", "cycles_per_token", "bytes_read", "bytes_written", "kv_bytes_written", "weight_bytes_read",
            "bandwidth_efficiency", "array_utilisation")
    report: dict[str, Any] = dict.fromkeys(keys)
    if config is None or not stats:
        return report

    def total(runs: Sequence[RunStats], name: str) -> int:
        return sum(run.counters[name] for run in runs)

    report |= {name: total(stats, name) for name in ("bytes_read", "bytes_written")}
    report |= {"kv_bytes_written": total(stats, "kv_written") * config.port_bits // 8,
               "weight_bytes_read": total(stats, "weights_read") * config.superbeat_bytes}
    if not (cycles := total(stats, "cycles")):
        return report
    report["cycles"] = cycles
    prompt = next((index for index, run in enumerate(stats) if run.head_rows), len(stats)) + 1
    if decode := stats[prompt:]:
        cycles = total(decode, "cycles")
        moved = total(decode, "bytes_read") + total(decode, "bytes_written")
        report |= {"cycles_per_token": cycles / len(decode),
                   "bandwidth_efficiency": moved / (cycles * config.superbeat_bytes),
                   "array_utilisation": total(decode, "array_active") / cycles}
    return report


def skip_report(decisions: np.ndarray | None) -> dict[str, float | None]:
    """skip_attention, skip_mlp: shares of the modules that tokens skipped; None without routers.

    decisions : bool [layers, 2, tokens], true where a module ran
    """
    names = [f"skip_{module}" for module in MODULES]
    if decisions is None or not decisions.size:
        return dict.fromkeys(names)
    return dict(zip(names, (1 - decisions.mean((0, 2))).tolist()))


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The numbers of a generation for people, each with its label."""
    lines = [f"prompt: {len(report['prompt_tokens'])} tokens in {report['prompt_seconds']:.2f} s (measured)"]
    rate = report["tokens_per_second"]
    lines += [f"generated: {len(report['tokens'])} tokens in {report['seconds']:.2f} s with the prompt (measured)"
              + (f", {rate:.3g} tokens/s of decode on this machine (measured)" if rate else "")]
    if report["cycles"]:
        per_token = report["cycles_per_token"]
        lines += [f"cycles: {report['cycles']:,} (simulated)"
                  + (f", {per_token:,.0f} per decoded token (simulated)" if per_token else "")]
    if report["bytes_read"] is not None:
        lines += [f"memory: {report['bytes_read']:,} bytes read, {report['bytes_written']:,} written (simulated)"]
    if report["skip_attention"] is not None:
        lines += [f"skipped: {report['skip_attention']:.1%} of attention, {report['skip_mlp']:.1%} of MLP modules "
                  f"(simulated)"]
    if report["bandwidth_efficiency"]:
        lines += [f"decode: {report['bandwidth_efficiency']:.1%} of the memory bandwidth used (simulated), array busy "
                  f"{report['array_utilisation']:.1%} of the cycles (simulated)"]
    return lines

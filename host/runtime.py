"""Run a compiled model on a device: load it once, then prefill and generate, nothing re-uploaded per token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from skipopu.hw.registers import FaultCause

from .compiled import Compiled
from .device import Device, read_register, write_register
from .errors import DeviceError, RequestError, RouterError
from .generation import Generator
from .layout import unpack_logits
from .routes import Force, check_forced, forced_routes, routes_from_words, words_of_routes

__all__ = ["Accelerator", "RunStats"]

_ARGUMENTS = ("ARG0", "ARG1", "ARG2", "ARG3")  # r1..r4: position, tokens, head row, head rows


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """One run of the program: a chunk of prompt, or one token.

    seconds : on this machine's clock; counters : of the device, see ``Device.counters``
    routes : bool [layers, 2, tokens], true where attention and MLP ran; None for a program without routers
    """

    position: int
    tokens: int
    head_rows: int
    seconds: float
    counters: dict[str, int]
    routes: np.ndarray | None = field(default=None, compare=False)


class Accelerator(Generator):
    """A model on a device. Constructing it checks the device and loads program and image.

    force : takes the place of the routers' decisions, see `routes`; changes nothing in memory or program
    stats : one RunStats per run since ``clear``
    Raises DeviceError if the device is another configuration than the model was compiled for, or has too little memory,
    RouterError for routes forced on a program without routers, or of another number of layers.
    """

    def __init__(self, device: Device, compiled: Compiled, timeout: float = 600.0, watchdog: int = 1_000_000,
                 force: Force | None = None) -> None:
        self.device, self.compiled, self.map, self.config = device, compiled, compiled.map, compiled.config
        self.vocab, self.context, self.eos_ids = self.map.vocab, self.map.context, self.map.eos_ids
        self.timeout, self.force = timeout, force
        if force is not None and not self.map.kv:
            raise RouterError("routes can be forced only on a model that was compiled with routers")
        check_forced(force, self.map.layers)
        self.stats: list[RunStats] = []
        self._last_rows = 0
        if device.config.config_hash != self.config.config_hash:
            raise DeviceError(f"the model is compiled for configuration {self.config.name}, the device is "
                              f"{device.config.name}; compile the model for {device.config.name}")
        needed = self.map.memory * self.config.port_bits // 8
        if device.memory_bytes < needed:
            raise DeviceError(f"the model needs {needed} bytes behind each port, the device has {device.memory_bytes}; "
                              f"compile with a shorter context or open the device with more memory")
        device.identify()
        self._load()
        self._set_up(watchdog)
        self._watchdog = watchdog

    def _load(self) -> None:
        for port in range(self.config.ports):
            memory = self.device.memory(port)
            if memory is None:
                self.device.write_memory(port, 0, self.compiled.image[port])
            else:
                memory[: self.compiled.image.shape[1]] = self.compiled.image[port]
        words = np.frombuffer(self.compiled.program.to_bytes(), np.uint8)
        self.device.write_memory(0, self._byte_address("program"), words)

    def _set_up(self, watchdog: int) -> None:
        device = self.device
        for port in range(self.config.ports):
            write_register(device, "PORT_BASE", device.port_base(port), port)
        write_register(device, "PROGRAM", device.port_base(0) + self._byte_address("program"))
        write_register(device, "PROGRAM_LENGTH", len(self.compiled.program.words))
        write_register(device, "MEMORY_LIMIT", self.map.memory)
        write_register(device, "WATCHDOG", watchdog)
        write_register(device, "ROUTE_FORCE", int(self.force is not None))

    def _byte_address(self, region: str) -> int:
        return self.map.address(region) * self.config.port_bits // 8

    def clear(self) -> None:
        """Forget the context and the statistics."""
        self.position = 0
        self.stats = []
        self.finish = ""

    def reset(self) -> None:
        """Reset the device after a fault and set it up again; the context is forgotten."""
        self.device.reset()
        self._set_up(self._watchdog)
        self.clear()

    def run(self, tokens: Sequence[int], head_row: int = 0, head_rows: int = 0, instructions: int = 0) -> None:
        """One run of the program over 1..chunk tokens at the current position, which it advances.

        head_row, head_rows : rows whose logits are computed; instructions : stop after so many, 0 runs all
        Raises RequestError for bad tokens or a full context, DeviceError for a fault (with the instruction).
        """
        self.check_tokens(tokens)
        if len(tokens) > self.map.chunk:
            raise RequestError(f"a run takes 1..{self.map.chunk} tokens, not {len(tokens)}")
        if not (0 <= head_row and 0 <= head_rows and head_row + head_rows <= len(tokens)):
            raise RequestError(f"head rows {head_row}..{head_row + head_rows - 1} are not in the {len(tokens)} rows")
        device = self.device
        for index, token in enumerate(tokens):
            write_register(device, "TOKEN_TABLE", int(token), index)
        for name, value in zip(_ARGUMENTS, (self.position, len(tokens), head_row, head_rows)):
            write_register(device, name, value)
        if self.force is not None:
            forced = forced_routes(self.force, self.map.layers, self.position, len(tokens))
            for index, word in enumerate(words_of_routes(forced)):
                write_register(device, "ROUTES_FORCED", word, index)
        write_register(device, "INSTRUCTION_LIMIT", instructions)
        begin = time.perf_counter()
        device.start()
        device.wait(self.timeout)
        seconds = time.perf_counter() - begin
        if (fault := device.fault()) is not None:
            raise DeviceError(self._described(*fault))
        routes = None
        if self.map.kv:
            words = [read_register(device, "ROUTES", index) for index in range(2 * self.map.layers)]
            routes = routes_from_words(words, len(tokens))
        self.stats.append(RunStats(position=self.position, tokens=len(tokens), head_rows=head_rows, seconds=seconds,
                                   counters=device.counters(), routes=routes))
        self._last_rows = head_rows
        self.position += len(tokens)

    def _described(self, cause: FaultCause, pc: int, port: int) -> str:
        """A fault in one line."""
        at = f"{cause.name} (port {port}) at {self.compiled.program.describe(pc)}"
        if cause == FaultCause.KV_FULL:
            return (f"memory for KV records is full: all {self.map.places} places behind port {port} are taken, in the "
                    f"run at position {self.position}; tokens skip less attention than the program provides for: "
                    f"compile it with a larger --kv-share, or begin anew ({at})")
        if cause == FaultCause.KV_POINTER:
            return (f"the pointer of a KV record behind port {port} is damaged, or names no record of this sequence; "
                    f"nothing was read through it: reset the device and begin anew ({at})")
        return f"the accelerator stopped with {at}; reset it before the next run"

    @property
    def decisions(self) -> np.ndarray | None:
        found = [run.routes for run in self.stats if run.routes is not None]
        if not self.map.kv:
            return None
        return np.concatenate(found, axis=2) if found else np.zeros((self.map.layers, 2, 0), bool)

    def prefill(self, tokens: Sequence[int]) -> int:
        """Read a prompt in chunks; returns the likeliest next token. Logits of the last token are then available."""
        self.check_tokens(tokens)
        for first in range(0, len(tokens), self.map.chunk):
            part = tokens[first : first + self.map.chunk]
            last = first + len(part) == len(tokens)
            self.run(part, len(part) - 1 if last else 0, 1 if last else 0)
        return self.argmax()

    def step(self, token: int) -> int:
        """Read one token; returns the likeliest next one."""
        self.run([token], 0, 1)
        return self.argmax()

    def evaluate(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Read tokens in chunks; yields logits of every token, float32 [rows of the chunk, vocab]."""
        self.check_tokens(tokens)
        for first in range(0, len(tokens), self.map.chunk):
            part = tokens[first : first + self.map.chunk]
            self.run(part, 0, len(part))
            yield self.logits()

    def argmax(self) -> int:
        """Index of the largest logit of the last row computed, as the device found it."""
        return read_register(self.device, "ARGMAX_INDEX")

    def logits(self) -> np.ndarray:
        """Logits of the last run, float32 [head rows, vocab], from device memory."""
        rows, beat = self._last_rows, self.config.port_bits // 8
        if rows == 0:
            raise RequestError("the last run computed no logits; ask for head rows")
        superbeats = rows * self.map.logits_width * 4 // self.config.superbeat_bytes
        at = self._byte_address("logits")
        ports = [self.device.read_memory(port, at, superbeats * beat).reshape(superbeats, beat)
                 for port in range(self.config.ports)]
        stream = np.stack(ports, axis=1).reshape(-1).view(np.float32)
        return unpack_logits(self.config, stream, rows, self.map.vocab)

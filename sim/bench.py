"""Short, fast block benches: an Amaranth component, Verilator and cocotb coroutines, called from pytest.

One file holds both sides. pytest collects the ``test_*`` functions; each names the component to build and the benches
to run on it. The simulator imports the same file and runs those coroutines, which ``@bench`` has marked::

    from skipopu.sim.bench import Stall, StreamSink, StreamSource, bench, run_bench

    @bench(source_stall=Stall, sink_stall=Stall, seed=[1, 2])           # the scenario axes, all combinations
    async def keeps_order(dut, source_stall, sink_stall, seed):          # clock runs, inputs zero, reset done
        sink = StreamSink(dut, "o", stall=sink_stall, seed=seed)
        StreamSource(dut, "i", stall=source_stall, seed=seed).send(range(100))
        assert await sink.take(100) == list(range(100))

    def test_keeps_order():
        run_bench(StreamRegister(8), keeps_order)

All benches of one ``run_bench`` share one simulator process (about a second to start), one after the other;
memories and registers without reset keep what the bench before left. Builds are cached by their RTLIL text and the
tools, under ``$SKIPOPU_CACHE`` (default ``$XDG_CACHE_HOME/skipopu``), and are safe to share between processes.

Timing inside a bench: after ``await RisingEdge(dut.clk)`` a read gives the value before that edge, and a write takes
effect just after it, so a bench behaves like a register of the same clock. Only the component's ports are visible.
Ports are named as Amaranth flattens the signature (``i__payload``, ``a__0__valid``); a struct payload is one vector,
which ``pack`` and ``unpack``, or the ``shape`` of a stream end, translate.
"""

import contextlib
import faulthandler
import fcntl
import functools
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cocotb
import cocotb_tools.config
from amaranth.back import rtlil, verilog
from amaranth.hdl import Shape, ShapeCastable, Value
from amaranth.lib import data, wiring
from cocotb.clock import Clock
from cocotb.triggers import Event, RisingEdge
from cocotb.types import Logic
from cocotb.utils import get_sim_time
from cocotb_tools.runner import get_runner
from skipopu.sim.build import cache_root
from skipopu.sim.toolchain import find_toolchain

__all__ = ["CLOCK_NS", "BenchFailure", "Stall", "StreamSink", "StreamSource", "Watch", "bench", "bench_parameters",
           "cycle", "pack", "reset", "run_bench", "unpack"]

CLOCK_NS = 10
"""Clock period of every bench, in nanoseconds of simulated time."""

_TOP = "top"
_VARIABLE = "SKIPOPU_BENCH"
_VERILATE = ["--cc", "--exe", "--vpi", "--prefix", "Vtop", "--top-module", _TOP, "-o", _TOP, "--timescale", "1ns/1ps",
             "-O3", "--x-assign", "fast", "--x-initial", "fast", "-Wno-fatal"]
# Light optimisation: a block's build takes longer than its run. The two CFG variables are the precompiled-header flags
# that the wheel's makefile lacks; its helper script wants the interpreter by name.
_MAKE = ["make", "-s", "-j2", "-f", "Vtop.mk", "OPT_FAST=-O1", "OPT_SLOW=-O0", "OPT_GLOBAL=-O1",
         "CFG_CXXFLAGS_PCH_I=-include", "CFG_GCH_IF_CLANG=", f"PYTHON3={sys.executable}"]


class BenchFailure(AssertionError):
    """A bench failed, or none ran; the message holds each bench's name, error and traceback."""


class Stall(float, Enum):
    """How often a stream end pauses: the probability of each cycle in which it offers or accepts nothing."""

    NEVER = 0.0
    HALF = 0.5
    MOSTLY = 0.875


# ---------------------------------------------------------------------------------------------- pytest's side


def run_bench(component: wiring.Component, *benches: Any, parameters: dict[str, Any] | None = None,
              trace: Path | None = None, wall_seconds: float = 300) -> None:
    """Build ``component`` (or take it from the cache) and run ``benches`` on it.

    benches : one or more coroutines decorated with ``@bench``, all of one module
    parameters : what ``bench_parameters()`` returns inside the simulator, where it has travelled as JSON
    trace : a VCD file to write, or None
    wall_seconds : real time after which the simulator is stopped, with the Python stack in the failure message

    Raises BenchFailure if a bench fails, if one did not run, or if the simulator stops by itself; ToolError if a tool
    is missing or the build fails; TypeError if ``benches`` is empty or holds something else.
    """
    __tracebackhide__ = True  # pytest shows the line of the test, not the inside of this function
    if not benches or not all(hasattr(b, "generate_tests") for b in benches):
        raise TypeError("run_bench needs one or more coroutines decorated with @bench after the component")
    module, = {b.module for b in benches}
    names = [b.name for b in benches]
    program = _build(component, trace=trace is not None)
    inputs = [name for name, flow in _ports(component) if flow == wiring.In]
    _make_importable(module)
    with tempfile.TemporaryDirectory(prefix="skipopu-bench-") as folder:
        log, results = Path(folder, "log"), Path(folder, "results.xml")
        stopped: BaseException | None = None
        try:
            get_runner("verilator").test(
                module, _TOP, hdl_toplevel_lang="verilog", build_dir=program, test_dir=folder, log_file=log,
                results_xml=str(results), test_filter=rf"\.({'|'.join(names)})(/.*)?$",
                test_args=["--trace", "--trace-file", str(trace.absolute())] if trace else [],
                extra_env={_VARIABLE: json.dumps(
                    {"inputs": inputs, "parameters": parameters or {}, "wall_seconds": wall_seconds})})
        except (SystemExit, RuntimeError) as error:  # the runner exits instead of raising, since it is made for scripts
            stopped = error
        _check_results(results, names, stopped, log)


def _check_results(results: Path, names: list[str], stopped: BaseException | None, log: Path) -> None:
    __tracebackhide__ = True
    cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    failures = []
    for case in cases:
        for problem in [*case.findall("failure"), *case.findall("error")]:
            kind, text = problem.get("type") or "Error", problem.get("message") or ""
            failures.append(f"{case.get('name')}: {kind}: {text}\n{problem.text or ''}")
    if failures:
        raise BenchFailure(f"{len(failures)} of {len(cases)} benches failed\n" + "\n".join(failures))
    ran = {case.get("name", "").partition("/")[0] for case in cases if case.find("skipped") is None}
    if stopped or not set(names) <= ran:
        missing = ", ".join(sorted(set(names) - ran)) or "none"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""
        raise BenchFailure(f"the simulator stopped early; benches that did not run: {missing}\n{tail}")


def _make_importable(module: str) -> None:
    """Put the folder from which ``module`` can be imported on ``sys.path``, which the runner hands to the simulator."""
    root = str(Path(sys.modules[module].__file__ or "").absolute().parents[module.count(".")])
    if root not in sys.path:
        sys.path.append(root)


def _ports(component: wiring.Component) -> Iterator[tuple[str, wiring.Flow]]:
    for path, member, value in component.signature.flatten(component):
        if len(Value.cast(value)):  # zero-width ports do not reach the Verilog
            yield "__".join(map(str, path)), member.flow


def _build(component: wiring.Component, *, trace: bool) -> Path:
    """Return the folder of the simulator program for ``component``; builds it unless the cache has it."""
    tools = find_toolchain(need=("g++", "make"))
    libs, share = cocotb_tools.config.libs_dir, cocotb_tools.config.share_dir
    verilate = [str(tools.verilator), *_VERILATE, *(["--trace"] if trace else []),
                "-LDFLAGS", f"-Wl,-rpath,{libs} -L{libs} -lcocotbvpi_verilator",
                str(share / "lib" / "verilator" / "verilator.cpp"), "public.vlt", "top.v"]
    make = [*_MAKE, f"CXX={tools.compiler}", f"LINK={tools.compiler}", f"VM_TRACE={int(trace)}"]
    # Only the ports are public: making every signal public costs build time and blocks Verilator's optimisations.
    public = ['public_flat_rw -module "top" -var "clk"', 'public_flat_rw -module "top" -var "rst"']
    public += [f'public_flat_rw -module "top" -var "{name}"' for name, _ in _ports(component)]

    flags = json.dumps([tools.identity, verilate, make])
    source = rtlil.convert(component, name=_TOP, emit_src=False)  # far quicker than the Verilog, which needs Yosys
    cache = cache_root() / "bench"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)  # its files are run as programs
    program = cache / _digest(flags, source)
    runtime = cache / f"runtime-{_digest(flags)}"
    with _locked(cache / f"{program.name}.lock"):
        if program.exists():
            return program
        with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
            work = Path(folder, "work")
            work.mkdir()
            (work / "top.v").write_text(verilog.convert(component, name=_TOP, emit_src=False))
            (work / "public.vlt").write_text("\n".join(["`verilator_config", *public, ""]))
            tools.run([*verilate, "--Mdir", "."], cwd=work)
            # Verilator's own C++ runtime is the same for every block: 10 s to compile, so it is kept beside them.
            with _locked(cache / f"{runtime.name}.lock"):
                if runtime.exists():
                    for item in runtime.iterdir():
                        shutil.copyfile(item, work / item.name)  # a new time stamp, so that make takes it as built
                    tools.run(make, cwd=work)
                else:
                    tools.run(make, cwd=work)
                    kept = Path(folder, "runtime")
                    kept.mkdir()
                    for item in work.glob("verilated*.o"):
                        shutil.copyfile(item, kept / item.name)
                    kept.rename(runtime)
            done = Path(folder, "done")
            done.mkdir()
            for name in (_TOP, "top.v"):
                shutil.copy(work / name, done)
            done.rename(program)
    return program


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ----------------------------------------------------------------------------------------- the simulator's side


def bench(*, timeout_cycles: int = 20_000, **axes: Iterable[Any]) -> Callable[[Callable], Any]:
    """Mark a coroutine as a bench: ``async def name(dut, **one_value_of_each_axis)``.

    timeout_cycles : clock cycles after which the bench fails, for each combination
    axes : keyword = values (a list or an Enum class); the bench runs once for each combination

    When the coroutine starts, the clock runs, every input is zero and the reset is over.
    """
    def mark(coroutine: Callable) -> Any:
        @functools.wraps(coroutine)
        async def run(dut: Any, **values: Any) -> None:
            if hasattr(dut, "clk"):
                Clock(dut.clk, CLOCK_NS, "ns").start()
            for name in json.loads(os.environ[_VARIABLE])["inputs"]:
                getattr(dut, name).value = 0
            # Simulated time stands still in an endless Python loop: only a watchdog outside the interpreter sees that.
            faulthandler.dump_traceback_later(json.loads(os.environ[_VARIABLE])["wall_seconds"], exit=True)
            await reset(dut)
            await coroutine(dut, **values)
            faulthandler.cancel_dump_traceback_later()
        marked = cocotb.test(timeout_time=timeout_cycles * CLOCK_NS, timeout_unit="ns")(run)
        return cocotb.parametrize(**{name: list(values) for name, values in axes.items()})(marked) if axes else marked
    return mark


def bench_parameters() -> dict[str, Any]:
    """The ``parameters`` that were given to ``run_bench``, after their way through JSON."""
    return json.loads(os.environ[_VARIABLE])["parameters"]


def cycle() -> int:
    """Number of clock cycles since the simulator started (the time in a trace, divided by ``CLOCK_NS``)."""
    return int(get_sim_time("ns")) // CLOCK_NS


async def reset(dut: Any, cycles: int = 2) -> None:
    """Hold ``rst`` for ``cycles`` clock cycles; does nothing for a block without clock or reset.

    Stream ends and watches may be running: no transfer counts while ``rst`` is high, and offers of ``dut`` end.
    """
    if hasattr(dut, "rst"):
        dut.rst.value = 1
    if hasattr(dut, "clk"):
        for _ in range(cycles):
            await RisingEdge(dut.clk)
    if hasattr(dut, "rst"):
        dut.rst.value = 0


def pack(shape: Any, value: Any) -> int:
    """The bits of ``value`` as an unsigned integer.

    shape : an Amaranth shape; value : an integer for a plain shape, a dict or sequence for a layout
    """
    if isinstance(shape, ShapeCastable):
        value = Value.cast(shape.const(value)).value  # type: ignore[attr-defined]
    return int(value) & ((1 << Shape.cast(shape).width) - 1)


def unpack(shape: Any, bits: int) -> Any:
    """The inverse of ``pack``: a dict for a struct, a list for an array, a signed or unsigned integer otherwise."""
    if isinstance(shape, ShapeCastable) and not isinstance(shape, data.Layout):
        inner = shape.as_shape()
        return unpack(inner, bits) if isinstance(inner, data.Layout) else shape.from_bits(bits)
    if isinstance(shape, data.Layout):
        parts = {name: unpack(field.shape, bits >> field.offset & (1 << field.width) - 1) for name, field in shape}
        return list(parts.values()) if isinstance(shape, data.ArrayLayout) else parts
    plain = Shape.cast(shape)
    return bits - (1 << plain.width) if plain.signed and bits >> plain.width - 1 else bits


class _StreamEnd:
    """The signals of the stream ``prefix``, and integers in place of cocotb's logic types."""

    def __init__(self, dut: Any, prefix: str) -> None:
        self.prefix = prefix
        self._edge = RisingEdge(dut.clk)
        self._valid = getattr(dut, f"{prefix}__valid")
        self._ready = getattr(dut, f"{prefix}__ready")
        self._payload: Any = getattr(dut, f"{prefix}__payload", None)  # None: a stream of width zero
        self._rst: Any = getattr(dut, "rst", None)

    def _in_reset(self) -> bool:
        return self._rst is not None and bool(self._rst.value)

    def _read_payload(self) -> int:
        if self._payload is None:
            return 0
        value = self._payload.value
        return int(value) if isinstance(value, Logic) else value.to_unsigned()


class _Rule:
    """``valid``, once high, stays high with the same payload until the transfer."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._offered: int | None = None

    def check(self, valid: bool, ready: bool, payload: int) -> None:
        if self._offered is not None:
            where = f"stream {self._prefix}, cycle {cycle()}"
            assert valid, f"{where}: valid fell before the transfer"
            assert payload == self._offered, \
                f"{where}: payload changed from {self._offered:#x} to {payload:#x} before the transfer"
        self._offered = payload if valid and not ready else None

    def forget(self) -> None:
        self._offered = None


class Watch(_StreamEnd):
    """Check from now on that the stream ``prefix`` keeps its offer until it is taken; a reset ends an offer.

    A violation fails the running bench with the cycle and the payloads. ``StreamSink`` has this check built in.
    """

    def __init__(self, dut: Any, prefix: str) -> None:
        super().__init__(dut, prefix)
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        rule = _Rule(self.prefix)
        while True:
            await self._edge
            if self._in_reset():
                rule.forget()
            else:
                rule.check(bool(self._valid.value), bool(self._ready.value), self._read_payload())


class StreamSource(_StreamEnd):
    """Drive the input stream ``prefix`` of ``dut`` from a queue.

    shape : how ``pack`` turns the given values into bits; None for unsigned integers
    stall : probability of a pause before each offer, in each cycle; may be changed while running
    The payload is random while ``valid`` is low, so that a block which looks at it then is found out.
    """

    def __init__(self, dut: Any, prefix: str, *, shape: Any = None, stall: float = Stall.NEVER, seed: int = 0) -> None:
        super().__init__(dut, prefix)
        self.stall = stall
        self._shape = shape
        self._random = random.Random(f"{prefix} {seed}")
        self._queue: deque[int] = deque()
        self._empty = Event()
        cocotb.start_soon(self._run())

    def send(self, values: Iterable[Any]) -> None:
        """Append ``values`` to the queue and return at once."""
        self._queue.extend(int(v) if self._shape is None else pack(self._shape, v) for v in values)
        self._empty.clear()

    async def sent(self) -> None:
        """Wait until everything in the queue has been transferred."""
        if self._queue:
            await self._empty.wait()

    async def _run(self) -> None:
        width = len(self._payload) if self._payload is not None else 0
        while True:
            offering = bool(self._queue) and self._random.random() >= self.stall
            self._valid.value = int(offering)
            if width:
                self._payload.value = self._queue[0] if offering else self._random.getrandbits(width)
            await self._edge
            while offering and (not self._ready.value or self._in_reset()):
                await self._edge
            if offering:
                self._queue.popleft()
                if not self._queue:
                    self._empty.set()


class StreamSink(_StreamEnd):
    """Take every transfer of the output stream ``prefix`` of ``dut``, and check that its offers are stable.

    shape : how ``unpack`` turns the bits into values; None for unsigned integers
    stall : probability of each cycle without ``ready``; may be changed while running (1.0 blocks the output)
    cycles : the cycle number of each transfer so far
    """

    def __init__(self, dut: Any, prefix: str, *, shape: Any = None, stall: float = Stall.NEVER, seed: int = 0) -> None:
        super().__init__(dut, prefix)
        self.stall = stall
        self.cycles: list[int] = []
        self._shape = shape
        self._random = random.Random(f"{prefix} {seed}")
        self._received: deque[Any] = deque()
        self._arrived = Event()
        cocotb.start_soon(self._run())

    async def take(self, count: int) -> list[Any]:
        """Wait for ``count`` payloads and return them in order."""
        while len(self._received) < count:
            self._arrived.clear()
            await self._arrived.wait()
        return [self._received.popleft() for _ in range(count)]

    async def rest(self, cycles: int = 20) -> list[Any]:
        """Wait ``cycles`` clock cycles and return all payloads not yet taken; ``[]`` is what a finished block gives."""
        for _ in range(cycles):
            await self._edge
        return await self.take(len(self._received))

    async def _run(self) -> None:
        rule = _Rule(self.prefix)
        while True:
            ready = self._random.random() >= self.stall
            self._ready.value = int(ready)
            await self._edge
            if self._in_reset():
                rule.forget()
                continue
            valid = bool(self._valid.value)
            payload = self._read_payload() if valid else 0
            rule.check(valid, ready, payload)
            if valid and ready:
                self._received.append(payload if self._shape is None else unpack(self._shape, payload))
                self.cycles.append(cycle())
                self._arrived.set()

"""Faults of the machine on its RTL: cause, instruction and port are right, and a reset leaves a machine that works."""

from dataclasses import replace

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.device import read_register, write_register
from skipopu.host.devices import open_device
from skipopu.host.errors import DeviceError
from skipopu.host.program import Program
from skipopu.host.routes import always_executing
from skipopu.host.runtime import Accelerator
from skipopu.hw.blocks.fetch import LINE_WORDS
from skipopu.hw.config import preset
from skipopu.hw.isa import COMMON, assemble, disassemble
from skipopu.hw.registers import Control, FaultCause, Status

CONFIG = preset("tiny")
BEAT = CONFIG.port_bits // 8
PROMPT = [5, 17, 60, 2, 9, 33]
COUNT = 3
FETCH_PORT = CONFIG.ports


@pytest.fixture(scope="module")
def compiled():
    return compile_model(random_model(8, kinds=("q4_1", "q8_0")), CONFIG, context=32)


@pytest.fixture(scope="module")
def expected(compiled):
    """Tokens and last logits of a run without faults, on the functional level."""
    accelerator = on("functional", compiled)
    return list(accelerator.generate(PROMPT, COUNT, stop=())), accelerator.logits()


@pytest.fixture
def accelerator(compiled):
    accelerator = on("rtl", compiled)
    with accelerator.device:
        yield accelerator


def on(device, compiled):
    opened = open_device(device, CONFIG, compiled.map.memory * BEAT)
    return Accelerator(opened, compiled, timeout=60, watchdog=3000)


def find(compiled, mnemonic, tensor=""):
    """Index of the first instruction of this kind that works on a tensor."""
    return next(pc for pc, (word, note) in enumerate(zip(compiled.program.words, compiled.program.notes))
                if disassemble(word).split()[0] == mnemonic and tensor in ("", note.tensor))


def patched(compiled, pc, line):
    """The compiled model with one instruction replaced by a line of assembly."""
    words = list(compiled.program.words)
    words[pc] = assemble(line)
    return replace(compiled, program=Program(words, compiled.program.notes))


def assert_fault(accelerator, cause, pc, port=0):
    """A generation stops with this fault: in the registers, and in the host's error with the instruction in words."""
    with pytest.raises(DeviceError) as caught:
        list(accelerator.generate(PROMPT, COUNT, stop=()))
    device, where = accelerator.device, accelerator.compiled.program.describe(pc)
    assert str(caught.value) == (f"the accelerator stopped with {cause.name} (port {port}) at {where}; reset it before "
                                 f"the next run")
    assert device.fault() == (cause, pc, port)
    assert read_register(device, "FAULT_STICKY") == 1 << cause
    assert read_register(device, "STATUS") & ~0xF00 == Status.FAULT | Status.DONE | Status.IDLE


def assert_works(accelerator, expected):
    """After a reset, the tokens and the bits of a machine that never failed."""
    accelerator.reset()
    assert accelerator.device.fault() is None and read_register(accelerator.device, "FAULT_STICKY") == 0
    assert list(accelerator.generate(PROMPT, COUNT, stop=())) == expected[0]
    np.testing.assert_array_equal(accelerator.logits().view(np.uint32), expected[1].view(np.uint32))


# ---- programs that ask for the impossible: the functional level stops at the same instruction

BAD_PROGRAMS = {
    "illegal opcode": ("vadd", "layers.0.o", ".word 0x7f", FaultCause.ILLEGAL_OPCODE),
    "word of zeros": ("token", "", ".word 0x0", FaultCause.ILLEGAL_OPCODE),
    "branch behind the program": ("branch", "", "branch imm=5000 condition=GE", FaultCause.FETCH_RANGE),
    "branch before the program": ("branch", "kv.1", "branch imm=-1", FaultCause.FETCH_RANGE),
    "token table index": ("token", "", f"addi rd=r9 imm={CONFIG.tokens}", FaultCause.TOKEN_RANGE),
    "negative token table index": ("token", "", "addi rd=r9 imm=-1", FaultCause.TOKEN_RANGE),
    "weights behind the limit": ("loadw", "layers.1.q", "loadw imm=1000000 count=8", FaultCause.MEMORY_RANGE),
    "weights across the limit": ("loadw", "layers.1.q", "loadw imm={limit} count=2", FaultCause.MEMORY_RANGE),
    "negative address": ("loadw", "layers.1.q", "loadw imm=-8 count=8", FaultCause.MEMORY_RANGE),
    "rows behind the buffer": ("loada", "final_norm",
                               f"loada writes=GAIN0 rows=1 x={CONFIG.abuf_rows - 3} count=4 beats=4",
                               FaultCause.BUFFER_RANGE),
    "format of KV records to load": ("loadkv", "kv.0", "loadkv reads=KVMEM rows=1 heads=2 head_beats=4 record=20 "
                                                       "format=3", FaultCause.KV_FORMAT),
    "format of KV records to store": ("storekv", "kv.1", "storekv writes=KVMEM rows=1 heads=2 head_beats=4 record=20 "
                                                         "format=3", FaultCause.KV_FORMAT),
    "a narrow record of another size": ("storekv", "kv.1", "storekv writes=KVMEM rows=1 heads=2 head_beats=4 record=14 "
                                                           "format=B12", FaultCause.BUFFER_RANGE),
    "too many KV heads": ("loadkv", "kv.0", "loadkv reads=KVMEM rows=1 heads=65 head_beats=4 record=520",
                          FaultCause.BUFFER_RANGE),
}


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_bad_program_stops_at_the_instruction(compiled, expected, accelerator, name):
    mnemonic, tensor, line, cause = BAD_PROGRAMS[name]
    pc = find(compiled, mnemonic, tensor)
    if cause == FaultCause.TOKEN_RANGE:  # the instruction before it sets the index
        index = assemble(disassemble(compiled.program.words[pc])) >> COMMON["imm_reg"].lo & 15
        bad = patched(compiled, pc - 1, line.replace("r9", f"r{index}"))
    else:
        bad = patched(compiled, pc, line.format(limit=compiled.map.memory - 1))
    assert_fault(on("functional", bad), cause, pc)
    broken = Accelerator(accelerator.device, bad, timeout=60, watchdog=3000)
    assert_fault(broken, cause, pc)
    accelerator.device.reset()
    assert_works(Accelerator(accelerator.device, compiled, watchdog=3000), expected)


@pytest.fixture(scope="module")
def reusing():
    """A model whose layers share records of keys and values."""
    model = random_model(8, kinds=("q4_1", "q8_0"))
    return compile_model(model, CONFIG, 32, always_executing(model, "reuse"))


@pytest.mark.parametrize(("cause", "layer", "change", "position", "port"), [
    (FaultCause.KV_POINTER, 0, lambda line: line, 5, 1),  # no sequence has begun
    (FaultCause.KV_FULL, 1, lambda line: line.replace("reuse=1", "reuse=1 places=5"), 0, 0),
])
def test_records_without_a_place(reusing, cause, layer, change, position, port):
    """The functional level stops at the same record, and a reset leaves a machine that works."""
    pc = find(reusing, "storekv", f"kv.{layer}")
    line = disassemble(reusing.program.words[pc])
    bad = patched(reusing, pc, change(" ".join(part for part in line.split() if not part.startswith("places="))
                                      if cause == FaultCause.KV_FULL else line))
    with open_device("rtl", CONFIG, reusing.map.memory * BEAT) as device:
        for opened in (open_device("functional", CONFIG, reusing.map.memory * BEAT), device):
            broken = Accelerator(opened, bad, timeout=60, watchdog=3000)
            broken.position = position
            with pytest.raises(DeviceError, match=cause.name):
                list(broken.generate(PROMPT, COUNT, stop=()))
            assert opened.fault() == (cause, pc, port)
        device.reset()
        reference = on("functional", reusing)
        expected = list(reference.generate(PROMPT, COUNT, stop=())), reference.logits()
        assert_works(Accelerator(device, reusing, watchdog=3000), expected)


def test_running_off_the_end(compiled, expected, accelerator):
    length = find(compiled, "loadw", "layers.1.o")
    write_register(accelerator.device, "PROGRAM_LENGTH", length)
    assert_fault(accelerator, FaultCause.FETCH_RANGE, length)
    assert_works(accelerator, expected)


@pytest.mark.parametrize(("region", "mnemonic"), [("layers.0.v", "loadw"), ("kv.0", "storekv"), ("logits", "storel")])
def test_memory_limit_guards_reads_and_writes(compiled, expected, accelerator, region, mnemonic):
    """The limit lies at the region: what is before it works, nothing behind it is touched."""
    limit = compiled.map.address(region)
    write_register(accelerator.device, "MEMORY_LIMIT", limit)
    before = [accelerator.device.memory(port)[limit * BEAT:].copy() for port in range(CONFIG.ports)]
    assert_fault(accelerator, FaultCause.MEMORY_RANGE, find(compiled, mnemonic, region.replace("logits", "head")))
    for port, memory in enumerate(before):
        np.testing.assert_array_equal(accelerator.device.memory(port)[limit * BEAT:], memory)
    assert_works(accelerator, expected)


def test_token_id_beyond_memory(compiled, expected, accelerator):
    """The host refuses such ids; the machine stops at the embedding's load."""
    accelerator.vocab = 1 << 24
    with pytest.raises(DeviceError, match="MEMORY_RANGE .* at .*embedding.*: loada "):
        accelerator.run([1 << 20])
    assert_works(accelerator, expected)


# ---- memories that fail

@pytest.mark.parametrize("code", ["slverr", "decerr"])
@pytest.mark.parametrize("port", range(CONFIG.ports))
@pytest.mark.parametrize(("mnemonic", "region"), [
    ("loada", "rope"), ("loadw", "layers.0.q"), ("loadkv", "kv.1"), ("loadw", "head")])
def test_read_error_names_instruction_and_port(compiled, expected, accelerator, mnemonic, region, port, code):
    address, size = compiled.map.regions[region]
    at = (address + (0 if region in ("rope", "kv.1") else size // 3)) * BEAT  # of the records only those of the prompt
    accelerator.device.sim.inject_error(port, "read", addresses=(at, at + BEAT), code=code)
    assert_fault(accelerator, FaultCause.READ_ERROR, find(compiled, mnemonic, region), port)
    accelerator.device.sim.clear_faults()
    assert_works(accelerator, expected)


@pytest.mark.parametrize("burst", [0, 1, 5, 40])
def test_read_error_at_any_burst(compiled, expected, accelerator, burst):
    accelerator.device.sim.inject_error(1, "read", burst=burst)
    with pytest.raises(DeviceError, match=r"READ_ERROR \(port 1\) at instruction .*: load"):
        list(accelerator.generate(PROMPT, COUNT, stop=()))
    assert_works(accelerator, expected)


@pytest.mark.parametrize("code", ["slverr", "decerr"])
@pytest.mark.parametrize(("region", "mnemonic", "port"), [
    ("kv.0", "storekv", 0), ("kv.1", "storekv", 1), ("logits", "storel", 0), ("logits", "storel", 1)])
def test_write_error_names_instruction_and_port(compiled, expected, accelerator, region, mnemonic, port, code):
    address, size = compiled.map.regions[region]
    accelerator.device.sim.inject_error(port, "write", addresses=(address * BEAT, (address + size) * BEAT), code=code)
    assert_fault(accelerator, FaultCause.WRITE_ERROR, find(compiled, mnemonic, region.replace("logits", "head")), port)
    accelerator.device.sim.clear_faults()
    assert_works(accelerator, expected)


@pytest.mark.parametrize("burst", [0, 3])
def test_write_error_at_a_burst(expected, accelerator, burst):
    accelerator.device.sim.inject_error(0, "write", burst=burst)
    with pytest.raises(DeviceError, match=r"WRITE_ERROR \(port 0\) at instruction .*: store"):
        list(accelerator.generate(PROMPT, COUNT, stop=()))
    assert_works(accelerator, expected)


@pytest.mark.parametrize("mnemonic, region", [("vset", ""), ("loadw", "layers.0.q"), ("loadw", "layers.1.down")])
def test_fetch_error_names_the_first_instruction_of_its_line(compiled, expected, accelerator, mnemonic, region):
    pc, first = find(compiled, mnemonic, region), compiled.map.address("program") * BEAT // 32
    accelerator.device.sim.inject_error(FETCH_PORT, "read", addresses=(32 * (first + pc), 32 * (first + pc + 1)))
    line = (first + pc) // LINE_WORDS * LINE_WORDS - first  # a line is fetched and judged as a whole
    assert_fault(accelerator, FaultCause.FETCH_ERROR, max(line, 0))
    accelerator.device.sim.clear_faults()
    assert_works(accelerator, expected)


# ---- nothing happens any more

@pytest.mark.parametrize(("port", "beats"), [(0, 0), (1, 0), (0, 37), (1, 500), (0, 4000), (FETCH_PORT, 0),
                                             (FETCH_PORT, 20)])
def test_hung_port_ends_in_the_watchdog(expected, accelerator, port, beats):
    accelerator.device.sim.inject_hang(port, after_beats=beats)
    with pytest.raises(DeviceError, match=r"WATCHDOG \(port 0\) at instruction \d+ \(.*\): \w+ "):
        list(accelerator.generate(PROMPT, COUNT, stop=()))
    accelerator.device.sim.clear_faults()
    assert_works(accelerator, expected)


def test_watchdog_blames_the_oldest_instruction_that_waits(compiled, expected, accelerator):
    """A MATMUL without its weights: the host sees which one."""
    pc = find(compiled, "loadw", "layers.1.down")
    bad = patched(compiled, pc, "addi")
    broken = Accelerator(accelerator.device, bad, timeout=60, watchdog=3000)
    assert_fault(broken, FaultCause.WATCHDOG, pc + 1)
    accelerator.device.reset()
    assert_works(Accelerator(accelerator.device, compiled, watchdog=3000), expected)


def test_watchdog_leaves_slow_memory_alone(compiled, expected, accelerator):
    """Only silence counts, not duration: the whole run takes far longer than the watchdog's limit."""
    write_register(accelerator.device, "WATCHDOG", 400)
    assert list(accelerator.generate(PROMPT, COUNT, stop=())) == expected[0]
    assert all(run.counters["cycles"] > 2000 for run in accelerator.stats)


# ---- after a fault, and without one

def test_start_after_a_fault_runs_nothing(compiled, expected, accelerator):
    accelerator.device.sim.inject_error(0, "read", burst=2)
    with pytest.raises(DeviceError, match="READ_ERROR"):
        accelerator.prefill(PROMPT)
    before, fault = [item.copy() for item in accelerator.device.memories], accelerator.device.fault()
    read_register(accelerator.device, "CTRL")
    accelerator.clear()
    with pytest.raises(DeviceError, match="READ_ERROR .*reset it before the next run"):
        accelerator.prefill(PROMPT)
    assert read_register(accelerator.device, "CTRL") & Control.DONE and accelerator.device.fault() == fault
    np.testing.assert_array_equal(accelerator.device.memories, before)
    assert_works(accelerator, expected)


@pytest.mark.parametrize("cycles", [1, 57, 500, 1234, 3000])
def test_reset_in_the_middle_of_a_run(expected, accelerator, cycles):
    """Transfers in flight are dropped, and none of them returns in the next run."""
    for name, value in (("ARG1", 4), ("ARG3", 4)):
        write_register(accelerator.device, name, value)
    accelerator.device.start()
    accelerator.device.sim.step(cycles)
    assert read_register(accelerator.device, "STATUS") & Status.RUNNING
    assert_works(accelerator, expected)


def test_instruction_limit_stops_without_a_fault(compiled, expected, accelerator):
    """Limits at which no stream is open; a later run is unharmed."""
    limits = [1, 5, *(executed_before(compiled, find(compiled, "loadw", f"layers.{name}"))
                      for name in ("0.k", "1.o", "1.down"))]
    functional = on("functional", compiled)
    for limit in limits:
        for item in (functional, accelerator):
            item.reset()
            item.run(PROMPT[:1], 0, 1, instructions=limit)
            assert item.device.fault() is None and item.stats[-1].counters["instructions"] == limit
        assert read_register(accelerator.device, "PC") == read_register(functional.device, "PC")
    assert_works(accelerator, expected)


def test_instruction_limit_inside_a_stream_ends_in_the_watchdog(compiled, expected, accelerator):
    """Cut behind a LOADW: the weights wait for a MATMUL that never comes."""
    pc = find(compiled, "loadw", "layers.0.v")
    with pytest.raises(DeviceError, match=f"WATCHDOG .* at instruction {pc} "):
        accelerator.run(PROMPT[:1], 0, 1, instructions=executed_before(compiled, pc) + 1)
    assert_works(accelerator, expected)


def executed_before(compiled, pc):
    """Instructions executed before the first time at ``pc``, in a run of one token at position 0."""
    functional, seen = on("functional", compiled), []
    functional.device.machine.observer = lambda at, *_: seen.append(at)
    functional.run(PROMPT[:1], 0, 1)
    return seen.index(pc)

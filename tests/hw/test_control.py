# amaranth: UnusedElaboratable=no
"""Control with a fetch and units that take random times: commands, hazards, faults, watchdog, instruction limit."""

import dataclasses
import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge
from control_model import conflicts, random_command, random_program, releasable, run
from skipopu.hw.blocks.command import Command, Fault
from skipopu.hw.blocks.control import Control
from skipopu.hw.blocks.fetch import Fetched
from skipopu.hw.blocks.hazard import HazardWindow
from skipopu.hw.config import preset
from skipopu.hw.isa import CONTROL, INSTRUCTIONS, MAX_LAYERS, OPCODES, Condition, RowList, Unit, encode
from skipopu.hw.registers import FaultCause
from skipopu.sim.bench import Stall, bench, cycle, pack, run_bench, unpack

CONFIG = preset("tiny")
UNITS = [unit for unit in Unit if unit != CONTROL]
HALT = encode("halt")


class Machine:
    """Everything around control: registers, fetch, four units that complete commands in order after random times.

    starts : (unit, command, cycle) in order of acceptance; finished : per start, the cycle of its done pulse
    advances : (cycle, dropped) of each instruction dispatched; routes : what was written to ROUTES
    held : units that complete nothing; slow : longest time of a command; ahead : commands a unit takes at once
    """

    def __init__(self, dut, program, *, arguments=(0,) * 7, tokens=(0,) * CONFIG.tokens, seed=0, slow=10, ahead=3,
                 fetch_stall=Stall.NEVER, accept_stall=Stall.NEVER, fetch_errors=(), watchdog=0, limit=0,
                 decisions=((0, 0),), forced=None):
        self.dut, self.program, self.tokens, self.errors = dut, program, tokens, fetch_errors
        self.slow, self.ahead, self.fetch_stall, self.accept_stall = slow, ahead, fetch_stall, accept_stall
        self.random = random.Random(seed)
        self.decisions, self.forced = decisions, forced
        self.held, self.ends = set(), 0
        self.forget()
        dut.csr__route_force.value = int(forced is not None)
        self.waited = [0] * 4
        dut.csr__program_length.value, dut.csr__watchdog.value = len(program), watchdog
        dut.csr__instruction_limit.value = limit
        for index, value in enumerate(arguments):
            getattr(dut, f"csr__arguments__{index}").value = value & 0xFFFFFFFF
        for coroutine in (self._fetch(), self._units(), self._registers()):
            cocotb.start_soon(coroutine)

    def forget(self):
        """Begin anew what is recorded of a run."""
        self.starts, self.finished, self.advances, self.routes = [], {}, [], []

    async def _registers(self):
        dut, index, layer = self.dut, 0, 0
        while True:
            for module in range(2):
                getattr(dut, f"csr__routes_forced__{module}").value = (
                    self.forced[layer][module] if self.forced else self.random.getrandbits(32))
            self.dut.csr__token_value.value = self.tokens[index] & 0xFFFFFFFF if index < len(self.tokens) else 0
            await RisingEdge(self.dut.clk)
            index = self.dut.csr__token_index.value.to_unsigned()
            layer = dut.csr__route_layer.value.to_unsigned()
            dropped = int(dut.dropped.value)
            if int(dut.csr__dispatched.value):
                self.advances.append((cycle(), dropped))
            else:
                assert not dropped
            if int(dut.csr__route_write.value):
                words = (getattr(dut, f"csr__routes__{module}").value.to_unsigned() for module in range(2))
                self.routes.append((layer, *words))
            self.ends += int(self.dut.csr__finished.value)
            waiting = self.dut.waiting.value.to_unsigned()
            self.waited = [total + (waiting >> unit & 1) for unit, total in enumerate(self.waited)]

    async def _fetch(self):
        dut, pc, offered = self.dut, None, False
        while True:
            offered = pc is not None and (offered or self.random.random() >= self.fetch_stall)
            dut.fetch__instruction__valid.value = int(offered)
            if offered:
                outside = pc >= len(self.program)
                dut.fetch__instruction__payload.value = pack(Fetched, {
                    "word": self.random.getrandbits(256) if outside or pc in self.errors else self.program[pc],
                    "pc": pc, "error": int(pc in self.errors), "outside": int(outside)})
            await RisingEdge(dut.clk)
            taken = offered and int(dut.fetch__instruction__ready.value)
            if taken:
                pc, offered = pc + 1, False
            if int(dut.fetch__redirect.value):
                assert not taken, "an instruction after a taken branch was used"
                pc, offered = dut.fetch__target.value.to_unsigned(), False
            elif not int(dut.fetch__enable.value):
                pc, offered = None, False

    async def _units(self):
        dut = self.dut
        queues = [[] for _ in UNITS]  # per unit, [index into starts, cycle when it completes]
        while True:
            pulses = 0
            done = sum(self.starts[index][0] == Unit.VECTOR for index in self.finished)
            dut.decided_attention.value, dut.decided_mlp.value = self.decisions[done % len(self.decisions)]
            for unit, queue in zip(UNITS, queues):
                if queue and unit not in self.held and queue[0][1] <= cycle():
                    index, _ = queue.pop(0)
                    self.finished[index] = cycle() + 1
                    pulses |= 1 << unit
                accept = len(queue) < self.ahead and self.random.random() >= self.accept_stall
                getattr(dut, f"commands__{int(unit)}__ready").value = int(accept)
            dut.done.value = pulses
            dut.busy.value = sum(1 << unit for unit, queue in zip(UNITS, queues) if queue)
            await RisingEdge(dut.clk)
            for unit, queue in zip(UNITS, queues):
                port = f"commands__{int(unit)}__"
                if int(getattr(dut, port + "valid").value) and int(getattr(dut, port + "ready").value):
                    command = unpack(Command(CONFIG), getattr(dut, port + "payload").value.to_unsigned())
                    earliest = queue[-1][1] if queue else cycle()
                    queue.append((len(self.starts), earliest + self.random.randint(1, self.slow)))
                    self.starts.append((unit, command, cycle()))

    async def start(self):
        self.dut.csr__start.value = 1
        await RisingEdge(self.dut.clk)
        self.dut.csr__start.value = 0
        await RisingEdge(self.dut.clk)

    async def run(self):
        """Start, and wait until control says that it has finished."""
        ends = self.ends
        await self.start()
        while self.ends == ends:
            await RisingEdge(self.dut.clk)

    def fault(self):
        return unpack(Fault, self.dut.csr__fault.value.to_unsigned())

    def of_unit(self, unit):
        """(command, start, done cycle) of the commands that a unit got, in order."""
        return [(command, at, self.finished.get(index))
                for index, (owner, command, at) in enumerate(self.starts) if owner == unit]

    def check_commands(self, trace):
        """Every unit got its commands, resolved, in order."""
        for unit in UNITS:
            names = ("pc", "opcode", "imm", "rows", "x", "mask", "body")
            got = [{name: command[name] for name in names} for command, *_ in self.of_unit(unit)]
            want = [{name: getattr(sent, name) for name in names} for sent in trace.commands if sent.unit == unit]
            for index, (one, other) in enumerate(zip(got, want)):
                assert one == other, f"{unit.name}, command {index}: {one}, expected {other}"
            assert len(got) == len(want), f"{unit.name}: {len(got)} commands, expected {len(want)}"
        assert self.routes == trace.routes
        assert sum(dropped for _, dropped in self.advances) == trace.dropped
        assert len(self.advances) == trace.count

    def check_hazards(self, trace):
        """No command started before what it conflicts with was done."""
        queues = {unit: iter(self.of_unit(unit)) for unit in UNITS}
        timed = [(sent, *next(queues[sent.unit])[1:]) for sent in trace.commands]
        for index, (later, start, _) in enumerate(timed):
            for earlier, _, done in timed[:index]:
                if conflicts(later, earlier):
                    assert done is not None and done < start, \
                        f"pc {later.pc} ({later.unit.name}) started in {start}, pc {earlier.pc} was done in {done}"


@bench(seed=range(12), slow=[2, 40], timeout_cycles=400_000)
async def random_programs_match_the_model(dut, seed, slow):
    generator = random.Random(seed)
    arguments = [generator.choice([0, 1, -1, 1 << 31, generator.getrandbits(32)]) for _ in range(7)]
    tokens = [generator.getrandbits(32) for _ in range(CONFIG.tokens)]
    program = random_program(generator, 150, CONFIG.tokens)
    routes = [tuple(generator.choice([0, 15, generator.getrandbits(4)]) for _ in range(2)) for _ in range(MAX_LAYERS)]
    routing = {"forced": [(a | 0xABCD0000, m) for a, m in routes]} if seed % 3 == 0 else {"decisions": routes[:13]}
    trace = run(program, arguments, tokens, width=CONFIG.tokens, **routing)
    machine = Machine(dut, program, arguments=arguments, tokens=tokens, seed=seed, slow=slow, **routing,
                      fetch_stall=generator.choice(list(Stall)), accept_stall=generator.choice(list(Stall)),
                      ahead=generator.choice([1, 3, 20]))
    for _ in range(2):  # registers are set again at the second start
        machine.forget()
        await machine.run()
        assert trace.halted and not machine.fault()["valid"]
        machine.check_commands(trace)
        machine.check_hazards(trace)
        assert len(machine.finished) == len(trace.commands), "halt waits for the units"
        assert dut.csr__pc.value.to_unsigned() == trace.pc
        assert not int(dut.csr__running.value)


@bench(seed=range(10), held=UNITS)
async def only_conflicting_commands_wait(dut, seed, held):
    """While one unit completes nothing, exactly the commands that need it (or stand behind such) wait."""
    generator = random.Random(seed)
    program = []
    for unit in generator.sample(UNITS * 3, 12):
        word = HALT
        while OPCODES[word & 0xFF].unit != unit:
            word = random_command(generator, list=RowList.ALL)
        program.append(word)
    program.append(HALT)
    trace = run(program, [0] * 7, [0] * CONFIG.tokens)
    machine = Machine(dut, program, seed=seed, slow=3, ahead=20)
    machine.held = {held}
    await machine.start()
    await ClockCycles(dut.clk, 150)
    expected = releasable(trace.commands, held)
    got = {command["pc"] for _, command, _ in machine.starts}
    assert got == expected, f"started {sorted(got)}, expected {sorted(expected)}"
    waiting = dut.waiting.value.to_unsigned()
    stuck = {trace.commands[index].unit for index in range(12) if index not in expected}
    assert waiting == sum(1 << unit for unit in stuck), "waiting shows which heads are blocked"
    machine.held = set()
    while not machine.ends:
        await RisingEdge(dut.clk)
    machine.check_hazards(trace)


@bench(count=[300])
async def one_unit_may_stay_far_behind(dut, count):
    """Counts of the other units wrap while a command waits; a long held unit blocks nothing it need not."""
    write, read = {"reads": 0, "writes": 1}, {"reads": 1, "writes": 0}
    other = {"reads": 0, "writes": 2}
    program = [encode("storekv", **write), encode("loadw", **read)]
    program += [encode("vinit", **other)] * count + [HALT]
    machine = Machine(dut, program, slow=1, ahead=20)
    machine.held = {Unit.STORE}
    await machine.start()
    while len(machine.of_unit(Unit.VECTOR)) < count:
        await RisingEdge(dut.clk)
    assert machine.of_unit(Unit.LOAD) == []
    assert machine.waited[Unit.LOAD] > count / 2 and machine.waited[Unit.VECTOR] == 0
    machine.held = set()
    while not machine.ends:
        await RisingEdge(dut.clk)
    machine.check_hazards(run(program, [0] * 7, []))


@bench()
async def independent_commands_flow_every_cycle(dut):
    program = [encode(name) for name in ("loadw", "matmul", "vinit", "storel")] * 20 + [HALT]
    machine = Machine(dut, program, slow=1, ahead=20)
    await machine.run()
    cycles = [at for *_, at in machine.starts]
    assert max(cycles) - min(cycles) == len(program) - 2


@bench(case=["illegal", "zero", "end", "empty", "branch", "negative branch", "fetch error", "token", "token negative",
              "no list", "no list, scalar"])
async def control_faults_stop_the_machine(dut, case):
    prefix = [encode("addi", rd=1, imm=CONFIG.tokens), encode("loadw", count=1)]
    word, cause, pc = {
        "illegal": (0xEE, FaultCause.ILLEGAL_OPCODE, 2), "zero": (0, FaultCause.ILLEGAL_OPCODE, 2),
        "end": (None, FaultCause.FETCH_RANGE, 2), "empty": (None, FaultCause.FETCH_RANGE, 0),
        "branch": (encode("branch", imm=5), FaultCause.FETCH_RANGE, 2),
        "negative branch": (encode("branch", imm=-(1 << 24)), FaultCause.FETCH_RANGE, 2),
        "fetch error": (HALT, FaultCause.FETCH_ERROR, 2),
        "token": (encode("token", rd=1, imm_reg=1), FaultCause.TOKEN_RANGE, 2),
        "token negative": (encode("token", rd=1, imm_reg=2), FaultCause.TOKEN_RANGE, 2),
        "no list": (encode("vinit", list=7), FaultCause.ILLEGAL_OPCODE, 2),
        "no list, scalar": (encode("addi", rd=1, list=7), FaultCause.ILLEGAL_OPCODE, 2),
    }[case]
    program = [] if case == "empty" else prefix if word is None else [*prefix, word, encode("loadw", count=2), HALT]
    machine = Machine(dut, program, arguments=(0, -1, 0, 0, 0, 0, 0),
                      fetch_errors=(2,) if case == "fetch error" else ())
    await machine.run()
    await ClockCycles(dut.clk, 50)
    assert machine.fault() == {"valid": 1, "cause": cause, "port": 0, "pc": pc}
    assert dut.csr__fault_seen.value.to_unsigned() == 1 << cause
    assert machine.ends == 1 and not int(dut.csr__running.value)
    assert len(machine.starts) <= 1, "nothing behind the fault is dispatched"
    if case != "fetch error":
        trace = run(program, [0, -1, 0, 0, 0, 0, 0], [0] * CONFIG.tokens)
        assert (trace.fault, trace.fault_pc) == (cause, pc), "the model agrees"
    await machine.start()
    await ClockCycles(dut.clk, 50)
    assert not int(dut.csr__running.value) and machine.ends == 1, "a start while faulted is refused"


@bench()
async def the_first_fault_of_a_unit_is_kept(dut):
    machine = Machine(dut, [encode("loadw")] * 50 + [HALT], slow=5, ahead=1)
    first = {"valid": 1, "cause": FaultCause.READ_ERROR, "port": 1, "pc": 7}
    same_cycle = {"valid": 1, "cause": FaultCause.WRITE_ERROR, "port": 0, "pc": 9}
    later = {"valid": 1, "cause": FaultCause.MEMORY_RANGE, "port": 0, "pc": 3}
    await machine.start()
    await ClockCycles(dut.clk, 20)
    dut.faults__0.value, dut.faults__1.value = pack(Fault, first), pack(Fault, same_cycle)
    await RisingEdge(dut.clk)
    dut.faults__0.value, dut.faults__1.value = 0, pack(Fault, later)
    await ClockCycles(dut.clk, 2)
    started = len(machine.starts)
    await ClockCycles(dut.clk, 100)
    assert machine.fault() == first
    assert dut.csr__fault_seen.value.to_unsigned() == sum(1 << fault["cause"] for fault in (first, same_cycle, later))
    assert machine.ends == 1 and not int(dut.csr__running.value)
    assert len(machine.starts) - started <= 1, "queues let nothing more go"


@bench(held=[Unit.LOAD, Unit.STORE])
async def the_watchdog_names_the_oldest_instruction(dut, held):
    program = [encode("vinit"), encode("storekv"), encode("loadw"), encode("storekv"), encode("loadw"), HALT]
    machine = Machine(dut, program, watchdog=100, ahead=1)
    machine.held = {held}
    start = cycle()
    await machine.run()
    assert machine.fault() == {"valid": 1, "cause": FaultCause.WATCHDOG, "port": 0,
                               "pc": 2 if held == Unit.LOAD else 1}
    assert 100 <= cycle() - start <= 160


@bench()
async def progress_of_any_kind_holds_the_watchdog_off(dut):
    machine = Machine(dut, [encode("loadw"), HALT], watchdog=50)
    machine.held = {Unit.LOAD}
    await machine.start()
    for _ in range(20):
        dut.progress.value = 1
        await RisingEdge(dut.clk)
        dut.progress.value = 0
        await ClockCycles(dut.clk, 40)
    assert not machine.fault()["valid"]
    await ClockCycles(dut.clk, 60)
    assert machine.fault()["cause"] == FaultCause.WATCHDOG


@bench()
async def a_watchdog_of_zero_is_off(dut):
    machine = Machine(dut, [encode("loadw"), HALT], watchdog=0)
    machine.held = {Unit.LOAD}
    await machine.start()
    await ClockCycles(dut.clk, 500)
    assert not machine.fault()["valid"] and int(dut.csr__running.value)


@bench(force=[False, True], timeout_cycles=60_000)
async def routes_give_every_list(dut, force):
    """Before a route all rows execute; then all pairs of two rows' bits and random ones, in chunks of some sizes."""
    every = [encode("vinit", list=choice, rows=rows) for choice in RowList for rows in (3, CONFIG.tokens, 4095)]
    generator = random.Random(1)
    program, routes = [*every], [(a, m) for a in range(4) for m in range(4)]
    routes += [(generator.randrange(16), generator.randrange(16)) for _ in range(30)]
    for layer, _ in enumerate(routes):
        for rows in (2, CONFIG.tokens):
            program += [encode("vinit", rows=4095), encode("route", rows=rows, layer=layer), *every[::2]]
    program.append(HALT)
    routing = {"forced": routes} if force else {"decisions": routes}
    trace = run(program, [0] * 7, [], **routing)
    assert len({sent.mask for sent in trace.commands}) > 12, "nearly every mask shows up"
    machine = Machine(dut, program, slow=3, **routing)
    await machine.run()
    machine.check_commands(trace)
    program = [*every, HALT]
    machine.program, machine.starts = program, []
    dut.csr__program_length.value = len(program)
    machine.forget()
    await machine.run()
    machine.check_commands(run(program, [0] * 7, []))  # the lists of the run before are forgotten


@bench()
async def dropped_instructions_take_a_cycle_each(dut):
    """Of all kinds, without effect."""
    kinds = [encode(name, list=RowList.ATTENTION, **fields) for name, fields in (
        ("addi", {"rd": 1, "imm": 99}), ("branch", {"imm": 0}), ("loadw", {"writes": 1}), ("vinit", {}),
        ("token", {"rd": 1}), ("storekv", {}), ("halt", {}), ("route", {"rows": 1}), ("matmul", {}))]
    program = [encode("route", rows=4), encode("vinit", imm_reg=1), *kinds * 5, encode("vinit", imm_reg=1), HALT]
    machine = Machine(dut, program, arguments=(7, *[0] * 6), decisions=[(0, 15)])
    await machine.run()
    machine.check_commands(run(program, [7, *[0] * 6], [0], decisions=[(0, 15)]))
    cycles, dropped = zip(*machine.advances)
    assert dropped == (0, 0, *[1] * len(kinds) * 5, 0, 0)
    assert cycles[-2] - cycles[1] == len(kinds) * 5 + 1, "one cycle each"
    assert not machine.fault()["valid"] and machine.ends == 1


@bench(held=UNITS)
async def a_route_waits_for_the_vector_unit_alone(dut, held):
    program = [encode("loadw"), encode("matmul"), encode("vinit"), encode("storekv"), encode("route", rows=3, layer=5),
               encode("loadw", list=RowList.MLP, rows=4), HALT]
    machine = Machine(dut, program, slow=3, decisions=[(0, 0), (15, 10)])
    machine.held = {held}
    await machine.start()
    await ClockCycles(dut.clk, 60)
    assert machine.routes == ([] if held == Unit.VECTOR else [(5, 7, 2)])
    machine.held = set()
    while not machine.ends:
        await RisingEdge(dut.clk)
    machine.check_commands(run(program, [0] * 7, [], decisions=[(0, 0), (15, 10)]))


@bench(words=[2, 5])
async def a_route_takes_three_cycles(dut, words):
    """Two, and one until the next instruction; the commands in front take one each."""
    program = [encode("loadw")] * (words - 1) + [encode("route", rows=4), encode("loadw"), encode("loadw"), HALT]
    machine = Machine(dut, program, slow=1, ahead=20)
    await machine.run()
    cycles = [at for at, _ in machine.advances]
    assert [after - before for before, after in zip(cycles, cycles[1:])][:words + 1] == [1] * (words - 2) + [2, 2, 1]


@bench()
async def the_watchdog_ends_a_stuck_route(dut):
    program = [encode("loadw"), encode("vinit"), encode("route", rows=4), HALT]
    machine = Machine(dut, program, watchdog=100)
    machine.held = {Unit.VECTOR}
    await machine.run()
    assert machine.fault() == {"valid": 1, "cause": FaultCause.WATCHDOG, "port": 0, "pc": 1}
    assert not machine.routes


@bench(limit=[1, 2, 7, 40, 59, 60, 61, 1000])
async def the_instruction_limit_counts_what_was_dispatched(dut, limit):
    loop = [encode("addi", rd=8, imm=15), encode("loadw", imm_reg=8), encode("vinit", list=RowList.NO_MLP),
            encode("addi", rd=8, imm_reg=8, imm=-1), encode("branch", condition=Condition.NE, rows_reg=8, imm=1), HALT]
    trace = run(loop, [0] * 7, [], limit)
    machine = Machine(dut, loop, limit=limit)
    await machine.run()
    machine.check_commands(trace)
    assert len(machine.advances) == trace.count == min(limit, 62)
    assert len(machine.finished) == len(trace.commands), "the units are idle at the end"
    assert dut.csr__pc.value.to_unsigned() == trace.pc and not machine.fault()["valid"]


@bench()
async def every_opcode_goes_to_its_unit(dut):
    items = [item for item in INSTRUCTIONS if item.unit != CONTROL]
    machine = Machine(dut, [encode(item.mnemonic) for item in items] + [HALT])
    await machine.run()
    assert {command["opcode"]: unit for unit, command, _ in machine.starts} == {i.opcode: i.unit for i in items}


def test_control():
    run_bench(Control(config=CONFIG), random_programs_match_the_model, only_conflicting_commands_wait,
              one_unit_may_stay_far_behind, independent_commands_flow_every_cycle, control_faults_stop_the_machine,
              the_first_fault_of_a_unit_is_kept, the_watchdog_names_the_oldest_instruction,
              progress_of_any_kind_holds_the_watchdog_off, a_watchdog_of_zero_is_off,
              routes_give_every_list, dropped_instructions_take_a_cycle_each,
              a_route_waits_for_the_vector_unit_alone, a_route_takes_three_cycles, the_watchdog_ends_a_stuck_route,
              the_instruction_limit_counts_what_was_dispatched, every_opcode_goes_to_its_unit)


def test_registers_in_a_memory():
    config = dataclasses.replace(CONFIG, name="compact", port_bits=32, ports=2, vector_lanes=2, compact=True)
    run_bench(Control(config=config), random_programs_match_the_model, routes_give_every_list,
              the_instruction_limit_counts_what_was_dispatched, every_opcode_goes_to_its_unit)


def test_a_small_window_only_slows_down():
    run_bench(Control(config=CONFIG, window=2), random_programs_match_the_model)


def test_window_sizes_that_break_the_counting_are_refused():
    with pytest.raises(ValueError, match="size must be a power of two from 2 to 64, not 128"):
        HazardWindow(size=128)

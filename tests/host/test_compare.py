"""Two devices side by side: equal ones agree, and an injected fault is traced to its instruction."""

import numpy as np
import pytest
from skipopu.golden.device import FunctionalDevice
from skipopu.golden.random_model import random_model
from skipopu.host.compare import compare
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.effects import run_effects
from skipopu.host.errors import RequestError
from skipopu.host.passes.walk import Arguments
from skipopu.host.routers import Routers
from skipopu.host.routes import RandomRoutes, words_of_routes
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset
from skipopu.hw.isa import Register
from skipopu.hw.registers import DebugBuffer, address

CONFIG = preset("tiny")
PROMPT = [5, 17, 60, 2, 9, 33]


class FaultyDevice(FunctionalDevice):
    """Flips one bit of what an instruction writes, in runs from a position on."""

    def break_at(self, pc, position=0):
        def observe(at, item, values, writes):
            if at == pc and self.machine.registers[Register.POSITION] >= position:
                for write in writes:
                    self._flip(write, values)
        self.machine.observer = observe

    def _flip(self, write, values):
        if write.buffer == "memory":
            row = write.rows[0]
            if values.get("reuse"):  # the record written last on port 0
                row = values["imm"] + (self.machine.kv.following[0] - 1) * values["record"]
            self.memories[0].reshape(-1, self.config.port_bits // 8)[row, 3] ^= 1
            self.machine.invalidate()
        elif write.buffer == "routes":
            self.machine.routes = {layer: (words[0], words[1] ^ 1) for layer, words in self.machine.routes.items()}
        elif write.buffer in ("abuf", "mbuf", "kvout"):
            getattr(self.machine, write.buffer).view(np.uint8)[write.rows, 2] ^= 1


@pytest.fixture(scope="module")
def compiled():
    return compile_model(random_model(8, kinds=("q4_1",)), CONFIG, context=32)


def pair_of(compiled, kind=FaultyDevice):
    size = compiled.map.memory * CONFIG.port_bits // 8
    return [Accelerator(device(CONFIG, size), compiled) for device in (FunctionalDevice, kind)]


def last(comparisons):
    return list(comparisons)[-1]


def find(compiled, mnemonic, tensor):
    return next(pc for pc, note in enumerate(compiled.program.notes) if note.tensor.endswith(tensor)
                and f": {mnemonic} " in compiled.program.describe(pc))


def test_equal_devices_agree(compiled):
    first, second = pair_of(compiled)
    result = last(compare(first, second, PROMPT, 5))
    assert result.difference is None
    assert (result.runs, result.logits) == (2 + 4, (len(PROMPT) + 4) * 96)
    first.clear()
    assert result.generated == list(first.generate(PROMPT, 5, stop=()))


@pytest.mark.parametrize(("mnemonic", "tensor", "place"), [
    ("loada", "embedding", "ABUF"), ("vnorm", "layers.0.attn_norm", "MBUF"), ("vrope", "layers.0.k", "KVOUT"),
    ("vrope", "layers.1.v", "KVOUT"), ("storekv", "kv.1", "memory of port"), ("vrope", "layers.1.q", "MBUF"),
    ("vscore", "kv.0", "ABUF"), ("vprob", "kv.1", "MBUF"), ("vmerge", "kv.1", "ABUF"), ("vscale", "layers.0.o", "MBUF"),
    ("vadd", "layers.0.o", "ABUF"), ("vswiglu", "layers.1.gate_up", "MBUF"), ("vadd", "layers.1.down", "ABUF"),
    ("storel", "head", "memory")])
def test_the_first_wrong_instruction_is_named(compiled, mnemonic, tensor, place):
    pc = find(compiled, mnemonic, tensor)
    first, second = pair_of(compiled)
    second.device.break_at(pc)
    difference = last(compare(first, second, PROMPT, 3)).difference
    assert (difference.pc, difference.position, difference.tokens) == (pc, 0, 4)
    assert difference.tensor.endswith(tensor) and difference.place.startswith(place)
    assert difference.expected != difference.got
    assert str(difference).startswith(f"first difference: instruction {pc} (") and f": {mnemonic} " in str(difference)


@pytest.mark.parametrize(("mnemonic", "tensor"), [
    ("vrope", "layers.1.v"), ("storekv", "kv.1"), ("vprob", "kv.1"), ("vswiglu", "layers.1.gate_up")])
def test_the_search_works_on_the_rtl(compiled, mnemonic, tensor):
    """Runs cut by the register and rows read through the debug window of the hardware; the fault is in the other."""
    pc, size = find(compiled, mnemonic, tensor), compiled.map.memory * CONFIG.port_bits // 8
    second = FaultyDevice(CONFIG, size)
    second.break_at(pc)
    with open_device("rtl", CONFIG, size) as first:
        pair = Accelerator(first, compiled, watchdog=20_000), Accelerator(second, compiled)
        difference = last(compare(*pair, PROMPT, 1)).difference
    assert difference is not None and difference.pc == pc, str(difference)


def test_a_fault_in_a_later_run_is_found_there(compiled):
    first, second = pair_of(compiled)
    second.device.break_at(find(compiled, "vswiglu", "layers.0.gate_up"), position=7)  # behind 6 of prompt, 1 step
    result = last(compare(first, second, PROMPT, 5))
    assert (result.difference.position, result.difference.tokens) == (len(PROMPT) + 1, 1)
    assert len(result.generated) == 2 and result.runs == 4


def test_a_fault_that_does_not_repeat_is_reported_as_timing(compiled):
    first, second = pair_of(compiled)
    pc, machine = find(compiled, "vadd", "layers.0.down"), second.device.machine
    def once(at, item, values, writes):
        if at == pc:
            machine.abuf[0, 0] += 1
            machine.observer = None
    machine.observer = once
    difference = last(compare(first, second, PROMPT[:1], 1)).difference
    assert difference.place.startswith("memory") and "cut runs agree" in str(difference)


def test_another_token_from_equal_logits_blames_vlogits(compiled):
    class Chooser(FunctionalDevice):
        def csr_read(self, offset):
            return super().csr_read(offset) ^ (offset == address("ARGMAX_INDEX"))

    difference = last(compare(*pair_of(compiled, Chooser), PROMPT, 3)).difference
    assert difference.pc == find(compiled, "vlogits", "head") and difference.place == "ARGMAX_INDEX"
    assert int(difference.expected) ^ 1 == int(difference.got)


def test_effects_name_what_the_machine_writes(compiled):
    """Against the machine's own account of every instruction of a run."""
    first, _ = pair_of(compiled)
    seen = []
    first.device.machine.observer = lambda pc, item, values, writes: seen.append((pc, writes))
    first.run(PROMPT[:3], 1, 2)
    effects = run_effects(CONFIG, compiled.program, Arguments(0, 3, 1, 2), PROMPT[:3])
    assert [effect.pc for effect in effects] == [pc for pc, _ in seen]
    for effect, (pc, writes) in zip(effects, seen):
        for write in writes:
            if write.buffer in ("abuf", "mbuf", "kvout"):
                rows = effect.rows[DebugBuffer[write.buffer.upper()]]
                np.testing.assert_array_equal(rows, np.unique(write.rows), err_msg=compiled.program.describe(pc))
            elif write.buffer == "memory":
                rows = np.concatenate([span.address + np.arange(span.superbeats) for span in effect.spans])
                np.testing.assert_array_equal(np.unique(rows), np.unique(write.rows))


@pytest.fixture(scope="module", params=["dense", "reuse"])
def routed(request):
    model, rng = random_model(8, kinds=("q4_1",), layers=3), np.random.default_rng(0)
    routers = Routers(kv=request.param, base=model.identity, bias=np.zeros((3, 2), np.float32),
                      difference=rng.standard_normal((3, 2, 64)).astype(np.float16))
    return compile_model(model, CONFIG, context=32, routers=routers)


def test_equal_devices_agree_with_routers(routed):
    first, second = pair_of(routed)
    assert last(compare(first, second, PROMPT, 5)).difference is None
    assert 0.1 < first.decisions.mean() < 0.9
    np.testing.assert_array_equal(first.decisions, second.decisions)


@pytest.mark.parametrize(("mnemonic", "tensor", "place"), [
    ("vnorm", "layers.2.down", "MBUF"), ("vrope", "layers.1.k", "KVOUT"), ("storekv", "kv.2", "memory of port"),
    ("vadd", "layers.2.o", "ABUF"), ("vswiglu", "layers.1.gate_up", "MBUF"), ("route", "layers.1.routers", "ROUTES")])
def test_the_first_wrong_instruction_is_named_with_routers(routed, mnemonic, tensor, place):
    pc = find(routed, mnemonic, tensor)
    first, second = pair_of(routed)
    for device in (first, second):
        device.force = RandomRoutes(0.3, 2)
        device.reset()
    second.device.break_at(pc, position=4)  # behind the first run, so that what was cut knows the past
    difference = last(compare(first, second, PROMPT, 3)).difference
    assert (difference.pc, difference.position) == (pc, 4) and difference.place.startswith(place)


def test_another_decision_from_equal_rows_blames_route(routed):
    """Another route changes what runs behind it; what it was scored from is the same."""
    first, second = pair_of(routed)
    for device, rate in ((first, 0.3), (second, 0.5)):
        device.force = RandomRoutes(rate, 2)
        device.reset()
    difference = last(compare(first, second, PROMPT, 1)).difference
    assert difference.place == "ROUTES" and ": route " in difference.instruction and difference.expected[:2] == "0b"


def test_effects_follow_the_routes(routed):
    first, _ = pair_of(routed)
    seen = []
    first.device.machine.observer = lambda pc, item, values, writes: seen.append((pc, writes))
    first.run(PROMPT[:4], 0, 4)
    words = words_of_routes(first.stats[-1].routes)
    arguments = Arguments(0, 4, 0, 4, tuple(zip(words[::2], words[1::2])))
    effects = run_effects(CONFIG, routed.program, arguments, PROMPT[:4])
    assert [effect.pc for effect in effects] == [pc for pc, _ in seen]
    for effect, (pc, writes) in zip(effects, seen):
        found = {write.buffer: write.rows for write in writes if write.buffer in ("abuf", "mbuf", "kvout")}
        assert {buffer.name.lower() for buffer in effect.rows} == set(found), routed.program.describe(pc)
        for buffer, rows in effect.rows.items():
            np.testing.assert_array_equal(rows, np.unique(found[buffer.name.lower()]))


def test_cuts_leave_no_stream_open(compiled):
    first, _ = pair_of(compiled)
    effects = run_effects(CONFIG, compiled.program, Arguments(0, 2, 0, 2), PROMPT[:2])
    mnemonics = [effect.mnemonic for effect in effects]
    for before, effect in zip(["", *mnemonics], effects):
        assert not (effect.cut and effect.mnemonic in ("loadw", "matmul", "vlogits")), (before, effect)
    assert mnemonics[-1] == "halt" and effects[-1].cut
    assert sum(effect.cut for effect in effects) > len(effects) / 2


@pytest.mark.parametrize(("prompt", "count", "message"), [
    ([], 1, "the prompt is empty"), (PROMPT, 0, "count must be at least 1"), ([96], 1, "not 96"),
    (PROMPT, 28, r"6 \+ 27 tokens do not fit into 32 positions")])
def test_bad_requests(compiled, prompt, count, message):
    with pytest.raises(RequestError, match=message):
        last(compare(*pair_of(compiled), prompt, count))


def test_different_models_are_refused(compiled):
    other = compile_model(random_model(8, kinds=("q4_1",)), CONFIG, context=32)
    with pytest.raises(RequestError, match="the same compiled model"):
        last(compare(pair_of(compiled)[0], pair_of(other)[1], PROMPT, 1))

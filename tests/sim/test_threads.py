"""The design as it is simulated, by one thread and by two: the same machine, cycle for cycle."""

import numpy as np
import pytest
from skipopu.golden.routed_cases import routed_case
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.errors import DeviceError
from skipopu.host.plan import KvSizes
from skipopu.host.routes import RandomRoutes
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset
from skipopu.sim.device import cached_verilog, default_threads

CONFIG = preset("tiny")


def run(compiled, case, **options):
    """(events, clocks per sleeper, counters, logits, memories, cycles) of the prompt and four tokens."""
    size = compiled.map.memory * CONFIG.port_bits // 8
    with open_device("rtl", CONFIG, size, **options) as device:
        device.sim.record()
        accelerator = Accelerator(device, compiled, timeout=120, watchdog=100_000, force=RandomRoutes(0.3, 1))
        accelerator.prefill(case.prompt)
        logits = [accelerator.logits().copy()]
        for token in case.prompt[:4]:
            accelerator.step(token)
            logits.append(accelerator.logits().copy())
        return (device.sim.events(), device.sim.clocks(), [stats.counters for stats in accelerator.stats],
                np.stack(logits), [memory.copy() for memory in device.memories], device.sim.cycle)


@pytest.mark.parametrize("memory, kv_format", [("ideal", "fp16"), ("hbm", "8")])
def test_forms_for_simulation_change_nothing(memory, kv_format):
    case = routed_case(f"random, {('dense', 'reuse')[kv_format == '8']}", CONFIG)
    compiled = compile_model(case.model, CONFIG, case.model.config.context, case.routers,
                             kv=KvSizes(format=kv_format, buffer=None))
    plain = run(compiled, case, memory=memory, verilog=cached_verilog(CONFIG, sleeps=True))
    for threads in (1, 2):
        np.testing.assert_equal(run(compiled, case, memory=memory, threads=threads), plain)


def test_a_reset_in_the_midst_of_a_program():
    case = routed_case("random, reuse", CONFIG)
    compiled = compile_model(case.model, CONFIG, case.model.config.context, case.routers)
    logits = []
    with open_device("rtl", CONFIG, compiled.map.memory * CONFIG.port_bits // 8, threads=2) as device:
        for cycles in (300, 7, 2000):
            accelerator = Accelerator(device, compiled, timeout=120, force=RandomRoutes(0.3, 1))
            accelerator.prefill(case.prompt)
            logits.append(accelerator.logits().copy())
            device.start()  # the last program once more
            device.sim.run(cycles)
            device.reset()
    for found in logits[1:]:
        np.testing.assert_array_equal(found, logits[0])


def test_who_gets_two_threads_unasked(monkeypatch):
    for processors, expected in (({0, 1}, {"tiny": 1, "sim": 2, "sim16": 2, "u280": 1}), ({0}, {"sim": 1, "sim16": 1})):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, found=processors: found, raising=False)
        assert {name: default_threads(preset(name)) for name in expected} == expected


def test_numbers_of_threads_that_there_are_not():
    for options, message in (({"threads": 3}, "threads must be 1 or 2, not 3"),
                             ({"threads": 2, "trace": True}, "threads must be 1 with waveforms, not 2")):
        with pytest.raises(DeviceError, match=f"^{message}$"):
            open_device("rtl", CONFIG, 4096, **options)

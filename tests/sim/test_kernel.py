"""The kernel's top under the driver: through its crossings a model generates the tokens of the functional level.

Both clocks are one here; what two clocks do to a port is in `tests/hw/test_crossing.py`.
"""

import pytest
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.device import read_register, write_register
from skipopu.host.devices import open_device
from skipopu.host.runtime import Accelerator
from skipopu.hw.blocks.axi import axi_ports
from skipopu.hw.config import preset
from skipopu.hw.kernel import Kernel
from skipopu.hw.registers import RESET_KEY, Status
from skipopu.hw.verilog import to_verilog
from skipopu.sim.cache import cached_text, hardware_digest
from skipopu.sim.device import RtlDevice

CONFIG = preset("tiny")
PROMPT = [3, 1, 4, 1, 5, 9]


class OneClock(wiring.Component):
    """The kernel with the clock and reset of the overlay's own top."""

    def __init__(self, kernel):
        self.kernel = kernel
        super().__init__({"clk": In(1), "rst": In(1)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.kernel = kernel = self.kernel
        m.d.comb += [kernel.ap_clk.eq(self.clk), kernel.ap_rst_n.eq(~self.rst),
                     kernel.ap_clk_2.eq(self.clk), kernel.ap_rst_n_2.eq(~self.rst)]
        return m


def verilog():
    kernel = Kernel(config=CONFIG, memory_burst=4)
    top = OneClock(kernel)
    ports = {"clk": (top.clk, None), "rst": (top.rst, None), "irq": (kernel.interrupt, None)}
    ports |= axi_ports("s_axil", kernel.s_axi_control) | axi_ports("mi_axi", kernel.mi_axi)
    for port in range(CONFIG.ports):
        ports |= axi_ports(f"m{port}_axi", kernel.m_axi[port])
    return to_verilog(top, name="skipopu_top", ports=ports)


@pytest.fixture(scope="module")
def compiled():
    return compile_model(random_model(3, layers=1), CONFIG)


@pytest.fixture(scope="module")
def device(compiled):
    text = cached_text("verilog", f"one-clock-{hardware_digest(CONFIG)}.v", verilog)
    with RtlDevice(CONFIG, compiled.map.memory * CONFIG.port_bits // 8, verilog=text) as device:
        yield device


def test_tokens_are_those_of_the_functional_level(device, compiled):
    plain = Accelerator(open_device("functional", CONFIG, device.memory_bytes), compiled)
    accelerator = Accelerator(device, compiled)
    assert list(accelerator.generate(PROMPT, 6, None)) == list(plain.generate(PROMPT, 6, None))
    assert accelerator.logits().tobytes() == plain.logits().tobytes()


def test_the_reset_register_resets_all_but_the_memory(device, compiled):
    accelerator = Accelerator(device, compiled)
    wanted = list(accelerator.generate(PROMPT, 4, None))
    write_register(device, "MEMORY_LIMIT", 1)
    device.start()
    device.wait(60)
    assert device.fault() is not None
    device.sim.run(2000)  # until what was under way is answered, as the driver waits on a card
    write_register(device, "RESET", RESET_KEY)
    assert read_register(device, "STATUS") == Status.IDLE and read_register(device, "PROGRAM_LENGTH") == 0
    accelerator._set_up(100_000)
    accelerator.clear()
    assert list(accelerator.generate(PROMPT, 4, None)) == wanted

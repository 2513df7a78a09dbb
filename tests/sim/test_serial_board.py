"""The whole board design behind its serial line, through the driver: the tokens of the functional level, whatever the
line does to bytes, and one clear line when it cannot be.
"""

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.device import read_register, write_register
from skipopu.host.devices import open_device
from skipopu.host.errors import DeviceError
from skipopu.host.runtime import Accelerator
from skipopu.host.serial_device import SerialDevice
from skipopu.hw.config import preset
from skipopu.hw.registers import FaultCause
from skipopu.sim.serial_line import NoisyLine, SimulatedBoard

CONFIG = preset("ulx3s")  # that of the ULX3S
MEMORY = 1 << 17
MODEL = random_model(5, layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, mlp=32, vocab=40)
COMPILED = compile_model(MODEL, CONFIG, 32)
PROMPT = np.random.default_rng(5).integers(0, 40, 6).tolist()
COUNT = 8
SHORT = 4e-4  # seconds of the board's clock, enough for 24 words there and back


@pytest.fixture
def board():
    line = SimulatedBoard(CONFIG, MEMORY)
    yield line
    line.close()


def expected():
    size = COMPILED.map.memory * CONFIG.port_bits // 8
    accelerator = Accelerator(open_device("functional", CONFIG, size), COMPILED)
    return list(accelerator.generate(PROMPT, COUNT)), accelerator


@pytest.mark.parametrize("drop, corrupt, seed", [(0, 0, 1), (1e-3, 1e-3, 4)], ids=["clean", "noisy"])
def test_tokens_equal_the_functional_level_on_any_line(board, drop, corrupt, seed):
    line = NoisyLine(board, drop=drop, corrupt=corrupt, seed=seed)
    board.timeout = SHORT
    with SerialDevice(CONFIG, COMPILED.image.shape[1], line=line, retries=30, frame_words=24) as device:
        accelerator = Accelerator(device, COMPILED)
        tokens, functional = expected()
        assert list(accelerator.generate(PROMPT, COUNT)) == tokens
        np.testing.assert_array_equal(accelerator.logits(), functional.logits())
        for port in range(CONFIG.ports):
            reference = functional.device.memory(port)
            np.testing.assert_array_equal(device.read_memory(port, 0, len(reference)), reference)
        for mine, other in zip(accelerator.stats, functional.stats, strict=True):
            assert mine.counters["instructions"] == other.counters["instructions"]
            assert mine.counters["cycles"] > mine.counters["instructions"]
        assert (line.lost > 0, line.changed > 0) == (drop > 0, corrupt > 0)
        assert (device.repeated > 0) == (drop + corrupt > 0)


def test_device_interface(board):
    with SerialDevice(CONFIG, MEMORY, line=board) as device:
        device.identify()
        assert (device.memory_bytes, device.clock_hz) == (MEMORY, board.clock_hz)
        data = np.random.default_rng(1).integers(0, 256, 3000, dtype=np.uint8)
        for offset in range(4):
            device.write_memory(0, 100, np.full(3100, 0x55, np.uint8))
            device.write_memory(0, 120 + offset, data[offset:-offset or None])
            around = device.read_memory(0, 100, 3100)
            end = 20 + len(data) - offset
            np.testing.assert_array_equal(around[20 + offset:end], data[offset:len(data) - offset])
            assert set(around[:20 + offset]) == set(around[end:]) == {0x55}
        write_register(device, "PROGRAM", 0x1_2345_6780)
        assert read_register(device, "PROGRAM") == 0x1_2345_6780
        for port, address, size in ((1, 0, 4), (0, MEMORY - 2, 4), (0, -4, 4)):
            with pytest.raises(DeviceError, match=f"memory of port 0..0 has {MEMORY} bytes, not 4 at"):
                device.read_memory(port, address, size)


def test_a_fault_shows_and_a_reset_clears_it(board):
    with SerialDevice(CONFIG, MEMORY, line=board) as device:
        write_register(device, "PROGRAM_LENGTH", 1)
        write_register(device, "MEMORY_LIMIT", MEMORY // 8)
        device.write_memory(0, 0, np.full(256, 0xFF, np.uint8))
        device.start()
        device.wait(10)
        assert device.fault()[0] is FaultCause.ILLEGAL_OPCODE and board.lights[:2] == (False, True)
        device.reset()
        assert device.fault() is None and board.lights[:2] == (False, False)
        assert read_register(device, "PROGRAM_LENGTH") == 0
        assert set(device.read_memory(0, 0, 256)) == {0xFF}


def test_a_board_that_lost_power_is_noticed(board):
    with SerialDevice(CONFIG, MEMORY, line=board) as device:
        board.power_up()
        with pytest.raises(DeviceError, match="the board at the line was restarted; open it again"):
            read_register(device, "STATUS")


def test_a_program_started_twice_by_a_lost_answer_runs_once(board):
    with SerialDevice(CONFIG, MEMORY, line=board) as device:
        accelerator = Accelerator(device, COMPILED)
        accelerator.run(PROMPT[:1])
        whole = board.write

        def forgetful(data):  # the answer to START is lost: read away before the driver sees it
            whole(data)
            board.write = whole
            assert board.read(1)
            board.read(100)
            return len(data)

        before = device.counters()["instructions"]
        board.write = forgetful
        device.start()
        device.wait(10)
        assert device.repeated == 1 and device.counters()["instructions"] == before


@pytest.mark.parametrize("noise", [{"drop": 1.0}, {"corrupt": 1.0}, {"corrupt": 0.4}])
def test_a_line_beyond_repair_ends_in_one_line(board, noise):
    line = NoisyLine(board, **noise)
    board.timeout = SHORT
    with pytest.raises(DeviceError, match=r"^no answer from the line to IDENTIFY after 4 attempts; [^\n]*check"):
        SerialDevice(CONFIG, MEMORY, line=line, retries=3)


def test_other_firmware_is_refused(board):
    with pytest.raises(DeviceError, match="CONFIG_HASH of the board at the line must be .* for configuration sim, not"):
        SerialDevice(preset("sim"), MEMORY, line=board)


def test_too_large_a_model_is_refused():
    board = SimulatedBoard(CONFIG, MEMORY)
    with pytest.raises(DeviceError, match=f"needs {MEMORY + 512} bytes behind each port, .* has {MEMORY}, 512 too few"):
        SerialDevice(CONFIG, MEMORY + 512, line=board)

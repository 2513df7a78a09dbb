"""Commands as control sends them, for benches of one unit."""

from skipopu.hw import isa
from skipopu.hw.blocks.command import Command
from skipopu.sim.bench import StreamSource


def as_command(mnemonic, *, pc=0, imm=0, rows=0, x=0, mask=-1, **body):
    """The payload of a Command stream; imm, rows and x with their registers already added. mask : of the row list"""
    word = isa.encode(mnemonic, **body)
    return {"opcode": word & 0xFF, "imm": imm, "rows": rows, "x": x, "body": word >> isa.BODY, "pc": pc,
            "mask": mask & (1 << rows) - 1, "needs": [0] * 4}


def command_source(dut, config, commands, *, stall=0.0, seed=0):
    """Send ``commands``, (mnemonic, fields) in order, with pc 100, 101, ..."""
    source = StreamSource(dut, "cmd", shape=Command(config), stall=stall, seed=seed)
    source.send([as_command(name, pc=100 + i, **fields) for i, (name, fields) in enumerate(commands)])
    return source

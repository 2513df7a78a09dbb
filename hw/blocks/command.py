"""What passes between control and the units: resolved instructions, faults, places of KV records."""

from types import SimpleNamespace

from amaranth.hdl import signed
from amaranth.lib import data

from ..config import OverlayConfig
from ..isa import BODY, COMMON, MAX_LAYERS, WORD_BITS, Instruction

__all__ = ["Command", "Fault", "PC_BITS", "PLACE_BITS", "PlaceAnswer", "PlaceRequest", "fields"]

PC_BITS = 24


class Command(data.StructLayout):
    """A resolved instruction.

    opcode; imm, rows and x : the header fields with their registers added; body : word bits of the instruction's own
    fields (see ``fields``); pc : instruction index, for faults;
    mask : bit t: row t of the chunk is in the instruction's list and below rows
    needs : per unit, how many of its commands (modulo 256, counted since reset) must be done before this one starts
    """

    def __init__(self, config: OverlayConfig):
        super().__init__({
            "opcode": COMMON["opcode"].bits, "imm": signed(COMMON["imm"].bits), "rows": COMMON["rows"].bits,
            "x": signed(COMMON["x"].bits), "body": WORD_BITS - BODY, "pc": PC_BITS,
            "mask": config.tokens, "needs": data.ArrayLayout(8, 4),
        })


#: Output of a unit that can fail: ``valid`` for at least one cycle, with what FAULT, FAULT_PORT and FAULT_PC will show.
Fault = data.StructLayout({"valid": 1, "cause": 4, "port": 5, "pc": PC_BITS})

PLACE_BITS = 16  #: number of a KV record within its port

#: The store unit asks the history for a place of a record; each port has ``places``.
PlaceRequest = data.StructLayout({
    "position": COMMON["x"].bits, "layer": (MAX_LAYERS - 1).bit_length(), "places": PLACE_BITS})

#: The answer: ``valid`` for one cycle, with the place or with the ``cause`` of a fault.
PlaceAnswer = data.StructLayout({"valid": 1, "place": PLACE_BITS, "cause": 4})


def fields(body, instruction: Instruction) -> SimpleNamespace:
    """The instruction's own fields by name, as slices of a command's ``body`` (signed where the field is)."""
    named = {}
    for item in instruction.body:
        part = body[item.lo - BODY:item.lo - BODY + item.bits]
        named[item.name] = part.as_signed() if item.signed else part
    return SimpleNamespace(**named)

"""The instruction set and the register map: one declaration each, and everything derived agrees with it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skipopu.hw import isa, registers
from skipopu.hw.config import PRESETS
from skipopu.hw.isa import COMMON, INSTRUCTIONS, IsaError, assemble, decode, disassemble, encode

DOCS = Path(__file__).parents[2] / "docs"


@st.composite
def instructions(draw):
    """(mnemonic, every field within its limits)."""
    item = draw(st.sampled_from(INSTRUCTIONS))
    values = {name: draw(st.one_of(st.sampled_from([place.minimum, place.maximum]),
                                   st.integers(place.minimum, place.maximum)))
              for name, place in item.fields.items() if name != "opcode"}
    return item.mnemonic, values


def test_opcodes_and_mnemonics_are_unique():
    assert len({item.opcode for item in INSTRUCTIONS}) == len(INSTRUCTIONS)
    assert len({item.mnemonic for item in INSTRUCTIONS}) == len(INSTRUCTIONS)


def test_opcodes_are_never_zero_or_all_ones():
    """Empty and erased memory must not be an instruction."""
    assert not {0x00, 0xFF} & {item.opcode for item in INSTRUCTIONS}


@pytest.mark.parametrize("item", INSTRUCTIONS, ids=lambda item: item.mnemonic)
def test_fields_do_not_overlap_and_fit(item):
    used = 0
    for place in item.fields.values():
        mask = (1 << place.bits) - 1 << place.lo
        assert not used & mask, f"{place.name} overlaps"
        used |= mask
    assert used.bit_length() <= isa.WORD_BITS


@pytest.mark.parametrize("item", INSTRUCTIONS, ids=lambda item: item.mnemonic)
def test_uses_names_header_fields(item):
    assert set(item.uses) <= set(COMMON)


@given(instructions())
def test_decode_returns_what_was_encoded(instruction):
    mnemonic, values = instruction
    item, decoded = decode(encode(mnemonic, **values))
    assert (item.mnemonic, decoded) == (mnemonic, values)


@given(instructions())
def test_assembling_the_disassembly_gives_the_word(instruction):
    mnemonic, values = instruction
    word = encode(mnemonic, **values)
    assert assemble(disassemble(word)) == word


@given(st.integers(0, (1 << isa.WORD_BITS) - 1).filter(lambda word: word & 0xFF not in isa.OPCODES))
def test_illegal_words_survive_as_data(word):
    assert assemble(disassemble(word)) == word
    with pytest.raises(IsaError, match="illegal opcode"):
        decode(word)


@pytest.mark.parametrize("item", INSTRUCTIONS, ids=lambda item: item.mnemonic)
def test_a_value_out_of_range_names_the_field_and_its_limits(item):
    for name, place in item.fields.items():
        if name == "opcode":
            continue
        for value in (place.minimum - 1, place.maximum + 1):
            with pytest.raises(IsaError, match=rf"{item.mnemonic}\.{name} must be {place.minimum}\.\.{place.maximum}"):
                encode(item.mnemonic, **{name: value})


@pytest.mark.parametrize("call, message", [
    (lambda: encode("jump"), "unknown instruction 'jump'; known: halt"),
    (lambda: encode("halt", rd=1), "halt has no field 'rd'; it has: opcode"),
    (lambda: encode("halt", opcode=1), "halt has no field 'opcode'"),
    (lambda: assemble("matmul mode=W5"), "matmul.mode: 'W5' is not a value of this field"),
    (lambda: assemble("addi rd=r1 imm=one"), "addi.imm: 'one' is not a value of this field"),
])
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(IsaError, match=message):
        call()


def test_comments_and_names_assemble():
    line = "branch imm=3 rows_reg=r1 x_reg=r2 condition=LT  # loop"
    assert assemble(line) == encode("branch", imm=3, rows_reg=1, x_reg=2, condition=isa.Condition.LT)


# ------------------------------------------------------------------------------------------------------- registers


def test_registers_do_not_overlap_and_fit():
    used = [word for item in registers.MAP for word in range(item.address, item.end, 4)]
    assert len(set(used)) == len(used)
    assert max(used) < 1 << registers.ADDRESS_BITS
    assert all(item.address % (4 * item.words) == 0 for item in registers.MAP)


def test_register_names_are_unique():
    assert len(registers.registers()) == len(registers.MAP)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_capabilities_describe_the_configuration(config):
    values = registers.capabilities(config)
    assert values["IDENTITY"].to_bytes(4, "little") == b"SKOP"
    assert values["VERSION"] >> 16 == isa.ISA_VERSION
    assert (values["LANES"], values["COLUMNS"], values["PORTS"]) == (config.lanes, config.columns, config.ports)
    assert config.ports <= registers.MAX_PORTS and config.tokens <= registers.MAX_TOKENS


@pytest.mark.parametrize("call, message", [
    (lambda: registers.address("CTL"), "unknown register 'CTL'; known: CTRL"),
    (lambda: registers.address("PORT_BASE", 32), r"PORT_BASE index must be 0\.\.31, not 32"),
    (lambda: registers.debug_address(registers.DebugBuffer.ABUF, 1 << 20, 0), "debug row must be"),
])
def test_register_errors_say_what_is_wrong(call, message):
    with pytest.raises(registers.RegisterError, match=message):
        call()


def test_indexed_registers_follow_one_another():
    assert registers.address("PORT_BASE", 3) == registers.address("PORT_BASE") + 24
    assert registers.address("TOKEN_TABLE", 3) == registers.address("TOKEN_TABLE") + 12


# ------------------------------------------------------------------------------------------------------------ docs


@pytest.mark.parametrize("name, text", [("isa.md", isa.markdown), ("registers.md", registers.markdown)])
def test_pages_are_the_generated_ones(name, text):
    assert (DOCS / name).read_text() == text(), f"docs/{name} is out of date: run make docs"


@pytest.mark.parametrize("module", [isa, registers])
def test_exported_names_exist(module):
    assert [name for name in module.__all__ if not hasattr(module, name)] == []

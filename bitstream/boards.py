"""Boards that the project makes files for, each with what differs from the others."""

from dataclasses import dataclass
from difflib import get_close_matches

__all__ = ["ALVEO", "AlveoBoard", "BoardError", "alveo_board"]


class BoardError(ValueError):
    """A board that nobody knows, or a configuration that does not fit it."""


@dataclass(frozen=True, kw_only=True)
class AlveoBoard:
    """A card with high-bandwidth memory that AMD's XRT drives."""

    name: str
    title: str  #: for people
    part: str
    platform: str  #: of Vitis
    config: str  #: of the overlay, by default
    channels: int  #: pseudo-channels of the memory, one port each
    channel_bytes: int
    memory_bits: int = 256  #: of a memory port
    memory_burst: int = 16  #: beats: memory controllers speak AXI3
    core_mhz: int = 225
    memory_mhz: int = 450
    slrs: int = 3  #: dies; the memory is at the first one

    def check(self, config):
        """Raises BoardError if a configuration has more ports than the memory."""
        if config.ports > self.channels:
            raise BoardError(f"configuration {config.name} has {config.ports} memory ports, {self.name} has "
                             f"{self.channels}; take a configuration with fewer")


ALVEO = {item.name: item for item in [
    AlveoBoard(name="u280", title="Alveo U280", part="xcu280-fsvh2892-2L-e",
               platform="xilinx_u280_gen3x16_xdma_1_202211_1", config="u280", channels=32, channel_bytes=256 << 20),
    AlveoBoard(name="u55c", title="Alveo U55C", part="xcu55c-fsvh2892-2L-e",
               platform="xilinx_u55c_gen3x16_xdma_3_202210_1", config="u280", channels=32, channel_bytes=512 << 20),
]}


def alveo_board(name):
    """The card of that name; BoardError lists the known ones."""
    if name not in ALVEO:
        near = get_close_matches(name, ALVEO, 1)
        raise BoardError(f"unknown board {name!r}{f', did you mean {near[0]!r}?' if near else ''}; known for export: "
                         f"{', '.join(ALVEO)}")
    return ALVEO[name]

"""The loop over the KV tiles of one layer's attention: loads, online softmax, and the sum of the values."""

from __future__ import annotations

from skipopu.hw.isa import Condition, MatmulMode, Register, Resource

from .layout import ceil_div
from .plan import Plan
from .program import Builder, vector_imm

__all__ = ["AttentionTiles"]

_TILES, _INDEX, _LIMIT, _OFFSET, _LEFT, _FIRST, _TILE = (
    Register.T0, Register.T1, Register.T2, Register.T3, Register.T4, Register.T5, Register.T6)
_R = Resource


class AttentionTiles:
    """Writes the attention of aligned queries (MBUF region mq) over the KV records of positions 0 .. POSITION + TOKENS.

    Registers T0 and T6 keep their values from ``count`` on; T1..T5 are used by each ``emit``.
    fused : False gives softmax maximum and sum a pass of their own, with the same results
    """

    def __init__(self, plan: Plan, build: Builder, fused: bool = True) -> None:
        self.plan, self.build, self.fused = plan, build, fused

    def count(self) -> None:
        """The number of tiles, ceil((POSITION + TOKENS) / tile), once for a run."""
        emit, tile = self.build.emit, self.plan.config.tile_tokens
        emit("add", rd=_TILES, imm_reg=Register.POSITION, rows_reg=Register.TOKENS)
        emit("addi", rd=_TILES, imm_reg=_TILES, imm=tile - 1)
        emit("shri", rd=_TILES, imm_reg=_TILES, rows=tile.bit_length() - 1)
        emit("addi", rd=_TILE, imm=tile)

    def emit(self, layer: int, records: int, buffer: int | None = None, out: int | None = None) -> None:
        """One layer.

        records : address of its KV region; buffer : records that the history buffer may hold for each port, by default
            what the plan says; out : first ABUF row of the sums, by default the plan's
        """
        plan, emit, config, on_chip = self.plan, self.build.emit, self.plan.config, self.plan.addresses()
        heads = {"rows_reg": Register.TOKENS, "heads": plan.model.kv_heads, "groups": plan.groups}
        tile, lanes = plan.beats(config.tile_tokens), plan.rows(config.tile_tokens)
        head, head_rows, width = plan.beats(plan.head_dim), plan.rows(plan.head_dim), plan.beats(plan.q_width)
        score = heads | {"beats": tile, "row_stride": tile, "group_stride": plan.chunk * tile,
                         "head_stride": plan.groups * plan.chunk * tile, "vector": tile}
        probabilities = vector_imm(on_chip["scores"], on_chip["mp"] * (config.lanes // config.vector_lanes))
        reuse = plan.kv == "reuse"
        where = {"imm_reg": _OFFSET}
        if reuse:
            where = {"reuse": 1, "layer": layer, "final": layer == plan.model.layers - 1, "x_reg": _FIRST,
                     "buffer": plan.buffer if buffer is None else buffer}
        emit("vinit")
        emit("addi", rd=_INDEX)
        emit("addi", rd=_LIMIT, imm_reg=Register.POSITION)
        emit("addi", rd=_FIRST if reuse else _OFFSET)
        # clamped here, since the instruction's row count has fewer bits than a context may need
        loop = emit("add", rd=_LEFT, imm_reg=_LIMIT, rows_reg=Register.TOKENS)
        emit("min", rd=_LEFT, imm_reg=_LEFT, rows_reg=_TILE)
        self._load(records, where)
        emit("matmul", reads=_R.MQ, x=on_chip["mq"], mode=MatmulMode.QK, **heads,
             n_tiles=config.tile_tokens // config.columns, k_tiles=head_rows, row_stride=plan.rows(plan.q_width),
             group_stride=head_rows, head_stride=plan.groups * head_rows, beats=tile)
        emit("vscore", writes=_R.SCORES, imm=vector_imm(on_chip["scores"], 0), x_reg=_LIMIT, **score)
        for _ in range(0 if self.fused else 2):  # the maximum, the sum
            emit("vscale", reads=_R.SCORES, writes=_R.MP, imm=probabilities, **score)
        emit("vprob", reads=_R.SCORES, writes=_R.MP, imm=probabilities, **score)
        emit("matmul", reads=_R.MP, x=on_chip["mp"], mode=MatmulMode.PV, **heads,
             n_tiles=ceil_div(plan.head_dim, config.columns), k_tiles=lanes, row_stride=lanes,
             group_stride=plan.chunk * lanes, head_stride=plan.groups * plan.chunk * lanes, beats=head)
        emit("vmerge", reads=_R.OUT, writes=_R.OUT, imm=vector_imm(on_chip["out"] if out is None else out, 0), **heads,
             beats=head, row_stride=width, group_stride=head, head_stride=plan.groups * head, vector=head)
        emit("addi", rd=_INDEX, imm_reg=_INDEX, imm=1)
        emit("addi", rd=_LIMIT, imm_reg=_LIMIT, imm=-config.tile_tokens)
        if reuse:
            emit("addi", rd=_FIRST, imm_reg=_FIRST, imm=config.tile_tokens)
        else:
            emit("addi", rd=_OFFSET, imm_reg=_OFFSET, imm=plan.tile_superbeats)
        emit("branch", rows_reg=_INDEX, x_reg=_TILES, condition=Condition.LT, imm=loop)

    def _load(self, records: int, where: dict[str, int]) -> None:
        """One tile. Only a tile with positions of this run has to wait until their records are stored."""
        build = self.build
        fields = {"imm": records, "rows_reg": _LEFT, **self.plan.record_fields, **where}
        older = build.emit("halt")
        build.emit("loadkv", reads=_R.KVMEM, **fields)
        over = build.emit("halt")
        build.patch(older, "branch", rows_reg=_LIMIT, x_reg=_TILE, condition=Condition.GE, list=build.rows,
                    imm=build.emit("loadkv", **fields))
        build.patch(over, "branch", condition=Condition.EQ, list=build.rows, imm=len(build.words))

"""The vector unit: everything that is not a matmul (`docs/numerics.md`, Vector operations).

Arrays are [h, g, t, beats, V], FP32 in float64. Each function computes one instruction on a `MachineState` and returns
what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
from skipopu.hw.isa import Destination, RowScale
from skipopu.hw.registers import FaultCause

from .arithmetic import LARGEST, LOWEST, add, align, from_int, mul, scale2, to_half
from .functions import exp2, recip, rsqrt, sigm
from .operands import ProgramError
from .state import ALPHA_DROP, MAXIMUM_INIT, BeatStream, MachineState, Nest, Write, nest

__all__ = ["VectorUnit"]

MINUS_LOG2E = np.float64(np.uint32(0xBFB8AA3B).view(np.float32))
TERM_LIMIT = 1 << 56
SUM_LIMIT = (1 << 63) - 1
SCORE_LIMIT = 1 << 44
PROB_LIMIT = 1 << 30
ATTENTION_BITS = 15  #: mantissas of queries and probabilities
Fail = Callable[[FaultCause, str], NoReturn]


class VectorUnit:
    """Executes vector instructions on ``state``, taking matmul results from ``results``, giving logits to ``logits``.

    fail(cause, detail) raises the fault of the instruction at hand. value_exponent() gives the V exponents, int
    [heads, tokens], of the KV tile whose PV is next.
    """

    def __init__(self, state: MachineState, results: BeatStream, logits: BeatStream, fail: Fail,
                 value_exponent: Callable[[], np.ndarray]) -> None:
        self.state, self.results, self.logits, self.fail = state, results, logits, fail
        self.value_exponent = value_exponent
        self.per_row = state.config.lanes // state.config.vector_lanes  # beats of one MBUF row

    def execute(self, mnemonic: str, values: dict[str, int]) -> list[Write]:
        """One vector instruction with its registers already added, for the rows in its ``mask``."""
        state = self.state
        if mnemonic == "vset":
            constants = np.array([values["imm"] & 0xFFFFFFFF, values["eps"]], np.uint32).view(np.float32)
            state.inv_n, state.eps = (np.float64(item) for item in constants)
            state.row_scale.clear()
            return []
        if mnemonic == "vinit":
            state.maximum[:], state.total[:] = MAXIMUM_INIT, 0
            return [Write("state", np.arange(len(state.maximum)))]
        if mnemonic == "vbias":
            state.router_bias[:] = values["imm"], values["mlp"]
            return []
        if not all(values[name] for name in ("heads", "groups", "mask", "beats")):
            raise ProgramError(f"{mnemonic}: heads, groups, rows and beats must be at least 1")
        return getattr(self, "_" + mnemonic)(values, self._nest(values))

    # ---- operands

    @staticmethod
    def _nest(values: dict[str, int], beats: int | None = None) -> Nest:
        return nest(values["heads"], values["groups"], values["mask"], values["beats"] if beats is None else beats,
                    values["head_stride"], values["group_stride"], values["row_stride"])

    def _rows(self, base: int, span: Nest, size: int, name: str) -> np.ndarray | slice:
        """Index of the beats ``base + offset`` in a buffer of ``size`` beats; BUFFER_RANGE beyond it."""
        if base + span.span > size:
            self.fail(FaultCause.BUFFER_RANGE, f"{name} row {base + span.span - 1} of {size}")
        return slice(base, base + span.span) if span.dense else base + span.offset

    def _load(self, base: int, span: Nest) -> np.ndarray:
        rows = self._rows(base, span, self.state.config.abuf_rows, "abuf")
        return self.state.read_abuf(rows).reshape(*span.shape, -1)

    def _store(self, base: int, span: Nest, v: np.ndarray) -> Write:
        rows = self._rows(base, span, self.state.config.abuf_rows, "abuf")
        self.state.abuf[rows] = v.reshape(-1, v.shape[-1]) if span.dense else v
        return Write("abuf", base + span.offset.ravel())

    def _source(self, values: dict[str, int]) -> int:
        return values["imm"] & 0xFFFF

    def _target(self, values: dict[str, int]) -> int:
        return values["imm"] >> 16 & 0xFFFF

    def _stream(self, span: Nest) -> np.ndarray:
        values = self.results.take(span.shape)
        if values is None:
            self.fail(FaultCause.WATCHDOG, f"needs {int(np.prod(span.shape))} beats of matmul results, "
                                           f"{len(self.results)} are there")
        self.state.saturations += int(np.count_nonzero(np.abs(values) == np.float32(LARGEST)))
        return values

    def _scaled(self, v: np.ndarray, values: dict[str, int], span: Nest, first: int = 0) -> np.ndarray:
        """v times the row scale. first : row of sumsq that belongs to t = 0."""
        state, kind = self.state, values["scale"]
        if kind == RowScale.ONE:
            return v
        if kind == RowScale.RSQRT:
            key = first, values["mask"]
            if key not in state.row_scale:
                rows = first + span.rows
                if rows[0] < 0 or rows[-1] >= len(state.sumsq):
                    self.fail(FaultCause.BUFFER_RANGE, f"row scale of rows {rows[0]}..{rows[-1]}")
                mean = mul(from_int(state.sumsq[rows], -24), state.inv_n)
                state.row_scale[key] = rsqrt(add(mean, state.eps))[:, None, None]
            return mul(v, state.row_scale[key])
        if kind == RowScale.RECIPROCAL:
            turn = np.arange(values["beats"]) // values["wrap"] if values["wrap"] else np.zeros(values["beats"], int)
            index = turn * state.config.tokens + span.rows[:, None]
            self._check_states(index)
            used, inverse = np.unique(index, return_inverse=True)
            return mul(v, recip(from_int(state.total[used], -30))[inverse.reshape(index.shape)][..., None])
        raise ProgramError(f"scale must be a RowScale, not {kind}")

    def _table(self, values: dict[str, int], span: Nest, part: int = 0) -> np.ndarray:
        """Table operand [t, beats, V]; row ``table + part + t * table_stride + beat mod wrap``."""
        beat = np.arange(span.shape[-1])
        rows = values["table"] + part + span.rows[:, None] * values["table_stride"] + (
            beat % values["wrap"] if values["wrap"] else beat)
        if rows.max() >= self.state.config.abuf_rows:
            self.fail(FaultCause.BUFFER_RANGE, f"abuf row {rows.max()} of {self.state.config.abuf_rows} (table)")
        return self.state.read_abuf(rows)

    def _states(self, span: Nest) -> np.ndarray:
        """Softmax state of each row: [h, g, t]."""
        heads, groups = (np.arange(count) for count in span.shape[:2])
        index = (heads[:, None, None] * len(groups) + groups[:, None]) * self.state.config.tokens + span.rows
        self._check_states(index)
        return index

    def _check_states(self, index: np.ndarray) -> None:
        if index.max() >= self.state.config.state_rows:
            self.fail(FaultCause.BUFFER_RANGE, f"softmax state {index.max()} of {self.state.config.state_rows}")

    # ---- results

    def _align(self, values: dict[str, int], span: Nest, out: np.ndarray, bits: int = 16) -> Write:
        """Align ``out`` into MBUF with mantissas of so many bits, one maximum exponent per ``vector`` beats."""
        state, config, per = self.state, self.state.config, self.per_row
        target, vector, beats = self._target(values), values["vector"], span.shape[-1]
        if vector == 0 or vector % per or beats % per or ((target + span.offset[..., 0]) % per).any():
            raise ProgramError(f"aligned vectors must fill whole rows of {per} beats: destination {target}, "
                               f"vector {vector}, beats {beats}")
        self._rows(target, span, config.mbuf_rows * per, "mbuf beat, ")
        mantissa, exponent, total = align(out.reshape(*span.shape[:3], -1), config.block, bits)
        rows = (target + span.offset[..., ::per]) // per  # [h, g, t, MBUF rows]
        exponent = exponent.reshape(*rows.shape, config.blocks)
        state.mbuf[rows] = mantissa.reshape(*rows.shape, config.lanes)
        state.mbuf_exponents[rows] = exponent
        state.mbuf_sums[rows] = total.reshape(*rows.shape, config.blocks)
        starts = np.arange(0, rows.shape[-1], vector // per)
        state.mbuf_emax[rows[..., starts]] = np.maximum.reduceat(exponent.max(-1), starts, axis=-1)
        return Write("mbuf", rows.ravel())

    def _sum_squares(self, v: np.ndarray, span: Nest) -> Write:
        """sumsq[t] of v [1, 1, t, beats, V]; several heads or groups start anew at beat 0, so the last one stays."""
        terms = np.minimum(np.floor(mul(v, v)[-1, -1] * 2.0**24 + 0.5), float(TERM_LIMIT))
        for t, term in zip(span.rows, terms):
            small = term.sum() < 2.0**53
            total = int(term.sum()) if small else sum(int(item) for item in term.ravel())
            self.state.sumsq[t] = min(total, SUM_LIMIT)
        self.state.row_scale.clear()
        return Write("sumsq", span.rows)

    def _score(self, values: dict[str, int], v: np.ndarray, span: Nest) -> Write:
        """Scores of the raw rows v [1, 1, t, beats, V] for both routers."""
        state, first, beats = self.state, values["x"], span.shape[-1]
        if first < 0:
            raise ProgramError(f"the first row of the routers must not be negative, but is {first}")
        if first + beats > state.config.router_rows:
            self.fail(FaultCause.BUFFER_RANGE, f"routers row {first + beats - 1} of {state.config.router_rows}")
        p = mul(v[-1, -1], state.routers[:, None, first : first + beats])  # [2, t, beats, V]
        size = np.minimum(np.floor(np.abs(p) * 2.0**24 + 0.5), float(SCORE_LIMIT))
        term = np.copysign(size, p).astype(np.int64)
        state.scores[:, span.rows] = state.router_bias[:, None] + term.sum((-2, -1))
        return Write("scores", span.rows)

    # ---- instructions

    def _normed(self, values: dict[str, int], v: np.ndarray, span: Nest) -> list[Write]:
        """What vnorm and vadd share: the sum of squares of v, its scores, and v times the gain, aligned."""
        return [self._sum_squares(v, span), *([self._score(values, v, span)] if values["route"] else ()),
                self._align(values, span, mul(v, self._table(values, span)))]

    def _vnorm(self, values: dict[str, int], span: Nest) -> list[Write]:
        return self._normed(values, self._load(self._source(values), span), span)

    def _vadd(self, values: dict[str, int], span: Nest) -> list[Write]:
        source = self._source(values)
        v = add(self._scaled(self._stream(span), values, span), self._load(source, span))
        return [self._store(source, span, v), *self._normed(values, v, span)]

    def _vrope(self, values: dict[str, int], span: Nest) -> list[Write]:
        v = self._scaled(self._stream(span), values, span)
        if values["wrap"]:
            swapped = v.reshape(*v.shape[:-1], -1, 2)[..., ::-1].reshape(v.shape)
            v = add(mul(v, self._table(values, span)), mul(swapped, self._table(values, span, values["wrap"])))
        if values["dest"] != Destination.KVOUT:
            return [self._align(values, span, v, ATTENTION_BITS)]
        config = self.state.config
        target, per = self._target(values), config.beat_elements // config.vector_lanes
        self._rows(target, span, config.kvout_rows * per, "kvout beat")
        bits, clipped = to_half(v)
        self.state.kvout.reshape(-1, config.vector_lanes)[target + span.offset] = bits
        self.state.saturations += clipped
        return [Write("kvout", np.unique((target + span.offset) // per))]

    def _vswiglu(self, values: dict[str, int], span: Nest) -> list[Write]:
        v = self._scaled(self._stream(span), values, span)
        gate, up = v[..., 0::2, :], v[..., 1::2, :]
        if gate.shape != up.shape:
            raise ProgramError(f"vswiglu.beats must be even, not {span.shape[-1]}")
        out = mul(mul(gate, up), sigm(mul(gate, MINUS_LOG2E)))
        return [self._align(values, self._nest(values, span.shape[-1] // 2), out)]

    def _vscore(self, values: dict[str, int], span: Nest) -> list[Write]:
        state, index = self.state, self._states(span)
        v = self._stream(span)
        column = np.arange(v.shape[-2] * v.shape[-1]).reshape(v.shape[-2:])
        allowed = column <= (values["x"] + span.rows)[:, None, None]  # [t, beats, V]
        v = np.where(allowed, v, LOWEST)
        write = self._store(self._source(values), span, v)
        ceiling = np.clip(np.ceil(v.max((-2, -1))), -16384, 16383).astype(np.int64)
        old = state.maximum[index]
        new = np.where(allowed.any((-2, -1)), np.maximum(old, ceiling), old)
        state.alpha[index] = np.where(old == MAXIMUM_INIT, ALPHA_DROP, np.minimum(new - old, 126))
        state.maximum[index] = new
        return [write, Write("state", index.ravel())]

    def _vprob(self, values: dict[str, int], span: Nest) -> list[Write]:
        state, index = self.state, self._states(span)
        exponent = self.value_exponent()
        if span.shape[0] > exponent.shape[0] or span.shape[-1] * self.state.config.vector_lanes != exponent.shape[1]:
            raise ProgramError(f"vprob of {span.shape[0]} heads x {span.shape[-1]} beats does not fit the KV tile "
                               f"of {exponent.shape[0]} heads x {exponent.shape[1]} tokens")
        minus = -state.maximum[index].astype(np.float64)
        p = exp2(add(self._load(self._source(values), span), minus[..., None, None]))
        term = np.minimum(np.floor(p * 2.0**30 + 0.5), float(PROB_LIMIT)).astype(np.int64)
        alpha = state.alpha[index]
        kept = np.where(alpha == ALPHA_DROP, 0, state.total[index] >> np.minimum(alpha, 63))
        state.total[index] = kept + term.sum((-2, -1))
        shift = exponent[: span.shape[0]].reshape(-1, 1, 1, span.shape[-1], p.shape[-1]) - 25
        return [self._align(values, span, scale2(p, shift), ATTENTION_BITS), Write("state", index.ravel())]

    def _vmerge(self, values: dict[str, int], span: Nest) -> list[Write]:
        alpha = self.state.alpha[self._states(span)][..., None, None]
        y, source = self._stream(span), self._source(values)
        kept = scale2(self._load(source, span), -alpha)
        return [self._store(source, span, np.where(alpha == ALPHA_DROP, y, add(y, kept)))]

    def _vscale(self, values: dict[str, int], span: Nest) -> list[Write]:
        return [self._align(values, span, self._scaled(self._load(self._source(values), span), values, span))]

    def _vlogits(self, values: dict[str, int], span: Nest) -> list[Write]:
        v = self._scaled(self._stream(span), values, span, first=values["x"])
        self.logits.put(v.astype(np.float32))
        candidates = v[-1, -1, -1].ravel()[: max(values["imm"], 0)]
        best = int(candidates.argmax()) if len(candidates) else 0
        value = np.float32(candidates[best] if len(candidates) else LOWEST)
        self.state.argmax_index, self.state.argmax_value = best, int(value.view(np.uint32))
        return [Write("argmax", np.zeros(1, np.int64))]

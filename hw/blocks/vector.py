"""Vector unit: everything that is not a matmul, one beat of V elements per cycle.

One pipeline serves all instructions; an instruction leaves it where its work is done. Cycle numbers (`T`) count from
the issue of a beat:

    T0  beat taken from the accumulator stream (or none)          operand x: ABUF port 0, operand table: ABUF port 1
    T1  acc * 2^n -> FP32                                  (FromInt)
    T4  y, or x for instructions without stream;  y * row scale   (FpMul)
    T6  v;  v * table (C)  |  swap(v) * table (S)  |  gate * -log2e  |  gate * up   (two FpMul)
    T8  + x  |  + S term  |  - running maximum                (FpAdd)
    T11 v;  v * gain, v * v, v * router weights (FpMul)  |  exp2 (Exp2)
    T20 sigmoid of the gate done;  * gate * up                (the gain's FpMul)

If the configuration is compact one unit of each kind serves all lanes, one after the other, which takes a cycle more
(`_positions`); beats then follow each other at a distance at which all registers still hold what the last lane needs.

The pipeline empties between instructions, so no hazards exist inside it. Row scalars (1/rms, 1/sum) are computed once
per row when its sum is complete, beside the pipeline; so are the routers' decisions. Loop t of all instructions takes
the rows of the command's mask. Arithmetic: `docs/numerics.md`, Vector operations.
"""

from types import SimpleNamespace

from amaranth import Array, Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .. import isa
from ..formats import (
    ALPHA_DROP,
    LOWEST,
    MAXIMUM_INIT,
    PROB_FRACTION,
    STATE_BITS,
    SUM_BITS,
    SUM_FRACTION,
)
from ..isa import Destination, RowScale
from .align import BlockAlign
from .command import Command, fields
from .compute import AccBeat
from .flags import Flags
from .fp import LARGEST, FpAdd, FpMul, FromInt, scale2, wire
from .functions import Exp2, Recip, Rsqrt, Sigmoid
from .half import ToFixed, ToHalf
from .load import AbufWrite
from .mbuf import AlignedRow
from .scores import RouterScores, SharedScores
from .trees import tree_sum
from .walker import LoopWalker, Nest

__all__ = ["VectorUnit"]

_OP = {item.mnemonic: item.opcode for item in isa.INSTRUCTIONS}
_LAYOUT = isa.OPCODES[_OP["vadd"]]
_MINUS_LOG2E = 0xBFB8AA3B  # FP32 of -log2(e)
_TERM_LIMIT = 56
_INTERVAL = 4  # cycles between beats if lanes share a unit


def _positions(config):
    """Where a beat is when, and where one has nothing more to do in the pipeline itself (``last``).

    If lanes share a unit each step takes as many cycles more as there are further lanes.
    """
    more = config.vector_lanes - 1 if config.compact else 0
    y = 1 + FromInt.latency + more
    t = y + FpMul.latency + more
    sum_ = t + FpMul.latency + more
    v = sum_ + FpAdd.latency + more
    gain, prob, halves = (v + kind.latency + more for kind in (FpMul, Exp2, ToHalf))
    squares, probs = (position + ToFixed.latency + more for position in (gain, prob))
    gates = sum_ + Sigmoid.latency + more
    last = {"vlogits": t, "vscale": t, "vswiglu": t, "vscore": y + 3, "vmerge": v, "vrope": halves,
            "vadd": squares + 1, "vnorm": squares + 1, "vprob": probs + 1}
    return SimpleNamespace(y=y, t=t, sum=sum_, v=v, gain=gain, prob=prob, halves=halves, squares=squares, probs=probs,
                           gates=gates, gated=gates + FpMul.latency + more, last=last)


class VectorUnit(wiring.Component):
    """Executes the vector instructions.

    Members
    -------
    cmd, done, busy : as in every unit
    acc : AccBeat stream from the compute unit
    load : rows written by the load unit: into ABUF, with address bit 15 into the router buffer
    decided_attention, decided_mlp : bit t: the last score of row t was not negative; stable when ``done``
    write_* : MBUF's write port
    exponent_slot, exponent_head, exponents : V exponents of one (slot, head), 5 bits per token, combinational
    kvout_row, kvout_data : read port of KVOUT for the store unit, data one cycle later
    logits : V-wide FP32 rows to the store unit
    argmax, argmax_value : of the last VLOGITS
    waiting : the running instruction waits for the stream; saturated : results of the array at the largest FP32
        number, and FP16 results clamped, in this cycle
    debug_row, debug_data : ABUF row for inspection while idle, one cycle later
    stirs : something may change at the next edge but for what `load` writes and `kvout_data`: not while an instruction
        waits for the stream and nothing is under way (combinational)
    """

    def __init__(self, *, config):
        self.config = config
        v = config.vector_lanes
        rows = range(config.mbuf_rows)
        super().__init__({
            "cmd": In(stream.Signature(Command(config))), "done": Out(1), "busy": Out(1),
            "acc": In(stream.Signature(AccBeat(config))),
            "load": In(stream.Signature(AbufWrite(config))),
            "decided_attention": Out(config.tokens), "decided_mlp": Out(config.tokens),
            "write_en": Out(1), "write_row": Out(rows), "write_vector": Out(rows), "write_first": Out(1),
            "write_data": Out(AlignedRow(config)),
            "exponent_slot": Out(1), "exponent_head": Out(8), "exponents": In(5 * config.tile_tokens),
            "kvout_row": In(range(config.kvout_rows)), "kvout_data": Out(config.port_bits),
            "logits": Out(stream.Signature(32 * v)),
            "argmax": Out(32), "argmax_value": Out(32),
            "waiting": Out(1), "saturated": Out(range(2 * v + 1)),
            "debug_row": In(range(config.abuf_rows)), "debug_data": Out(32 * v), "stirs": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        lanes, at, compact = config.vector_lanes, _positions(config), config.compact

        # ---- the running instruction ---------------------------------------------------------------------------
        running, opcode = Signal(), Signal(8)
        src, dst, first_row, limit, imm = Signal(16), Signal(16), Signal(16), Signal(signed(16)), Signal(32)
        body = Signal(self.cmd.payload.body.shape(), reset_less=True)
        mask = Signal(config.tokens)
        f = fields(body, _LAYOUT)
        op = {name: Signal(name=f"is_{name}") for name in (
            "vnorm", "vadd", "vrope", "vswiglu", "vscore", "vprob", "vmerge", "vscale", "vlogits")}
        scale_on, rotate, adds, norms = Signal(), Signal(), Signal(), Signal()
        inv_n, eps = Signal(32), Signal(32)
        bias = [Signal(signed(32), name=f"bias_{name}") for name in ("attention", "mlp")]
        to_abuf = op["vadd"] | op["vscore"] | op["vmerge"]
        to_kvout = op["vrope"] & (f.dest == Destination.KVOUT)
        to_mbuf = op["vnorm"] | op["vadd"] | op["vswiglu"] | op["vprob"] | op["vscale"] | (op["vrope"] & ~to_kvout)
        from_stream = ~(op["vnorm"] | op["vprob"] | op["vscale"])
        m.d.comb += [src.eq(imm[:16]), dst.eq(imm[16:])]
        turns = wire(m, op["vrope"] & (f.wrap != 0), "turns")
        m.d.sync += [  # known before the first beat is where they matter
            scale_on.eq((f.scale != RowScale.ONE) & ~(op["vnorm"] | op["vscore"] | op["vprob"] | op["vmerge"])),
            rotate.eq(turns), adds.eq(turns | op["vadd"] | op["vmerge"] | op["vprob"]),
            norms.eq(op["vnorm"] | op["vadd"]),
        ]
        scoring = wire(m, (op["vnorm"] | op["vadd"]) & f.route, "scoring")

        vectors = config.columns // lanes
        nest, nest_out = Signal(Nest(config)), Signal(Nest(config))
        for target in (nest, nest_out):
            halve = op["vswiglu"] if target is nest_out else 0
            m.d.comb += [
                target.heads.eq(f.heads), target.groups.eq(f.groups), target.mask.eq(mask),
                target.beats.eq(f.beats >> halve), target.row_stride.eq(f.row_stride),
                target.group_stride.eq(f.group_stride), target.head_stride.eq(f.head_stride), target.wrap.eq(f.wrap),
                target.vector.eq(f.vector), target.table_stride.eq(f.table_stride),
                target.per_tile.eq(Const(vectors) >> halve),
            ]
        start, begin = Signal(), Signal()
        m.d.sync += begin.eq(start)

        def walker(name, step, *places, loops=nest):
            """The walk of the beats at a place, which steps when one is there.

            places : where that is, (condition, position) of which the first that holds counts; if compact, what the
                walk of the issued beats shows travels there instead of being counted once more
            """
            if compact and places:
                return _travelled(m, walk_issue, places, travelled)
            m.submodules[f"walk_{name}"] = unit = LoopWalker(config=config)
            m.d.comb += [unit.nest.eq(loops), unit.start.eq(begin), unit.step.eq(step)]
            return unit

        # ---- issue ------------------------------------------------------------------------------------------------
        issue = Signal()
        valid = [Signal(name=f"valid{i}") for i in range(max(at.last.values()) + 1)]  # valid[i]: a beat is at Ti
        m.d.comb += valid[0].eq(issue)
        for i, (here, there) in enumerate(zip(valid, valid[1:])):
            m.d.sync += there.eq(here & ~Cat(op[name] for name, last in at.last.items() if last == i).any())
        issuing = Signal()
        # The first beat may be issued before ``begin`` is over, so this walker starts with the command.
        m.submodules.walk_issue = walk_issue = LoopWalker(config=config)
        travelled, coming = {}, fields(self.cmd.payload.body, _LAYOUT)
        pause = Signal(range(_INTERVAL))  # cycles until the next beat may be issued
        if compact:
            with m.If(issue):
                m.d.sync += pause.eq(_INTERVAL - 1)
            with m.Elif(pause != 0):
                m.d.sync += pause.eq(pause - 1)
        m.d.comb += [
            walk_issue.nest.eq(nest), walk_issue.start.eq(start), walk_issue.step.eq(issue),
            walk_issue.nest.mask.eq(Mux(start, self.cmd.payload.mask, mask)),
        ]
        if compact:
            m.d.comb += [walk_issue.nest.row_stride.eq(Mux(start, coming.row_stride, f.row_stride)),
                         walk_issue.nest.table_stride.eq(Mux(start, coming.table_stride, f.table_stride))]
        logits_space, may = Signal(), Signal()
        scalar_busy, tail_busy = Signal(), Signal()
        m.d.comb += [
            issue.eq(may & (~from_stream | self.acc.valid)), self.acc.ready.eq(may & from_stream),
            may.eq(issuing & (~op["vlogits"] | logits_space) & (pause == 0)),
            self.waiting.eq(issuing & from_stream & ~self.acc.valid),
            self.busy.eq(running),
        ]
        with m.If(issue & walk_issue.last):
            m.d.sync += issuing.eq(0)
        under_way = Cat(valid[1:], tail_busy).any()
        idle = ~issuing & ~under_way
        m.d.comb += self.stirs.eq(
            ~running | issue | begin | idle | under_way | scalar_busy | self.logits.valid)
        accept = self.cmd.valid & ~running
        fresh_argmax = Signal()
        m.d.comb += [self.cmd.ready.eq(accept & ~scalar_busy), start.eq(self.cmd.ready & self.cmd.valid)]
        with m.If(start):
            m.d.sync += [signal.eq(self.cmd.payload.opcode == _OP[name]) for name, signal in op.items()]
            m.d.sync += [
                running.eq(1), opcode.eq(self.cmd.payload.opcode), imm.eq(self.cmd.payload.imm),
                body.eq(self.cmd.payload.body), mask.eq(self.cmd.payload.mask), limit.eq(self.cmd.payload.x),
                first_row.eq(self.cmd.payload.x), fresh_argmax.eq(1),
                issuing.eq(Cat(self.cmd.payload.opcode == _OP[name] for name in ("vset", "vinit", "vbias")) == 0),
            ]
        with m.Elif(running & idle):
            m.d.sync += running.eq(0)
            with m.If(opcode == _OP["vset"]):
                m.d.sync += [inv_n.eq(imm), eps.eq(fields(body, isa.OPCODES[_OP["vset"]]).eps)]
            with m.If(opcode == _OP["vbias"]):
                m.d.sync += Cat(bias).eq(Cat(imm, fields(body, isa.OPCODES[_OP["vbias"]]).mlp))
            with m.If(op["vprob"]):
                m.d.sync += self.exponent_slot.eq(~self.exponent_slot)
        m.d.comb += self.done.eq(running & idle & ~start)

        # ---- ABUF ----------------------------------------------------------------------------------------------------
        m.submodules.abuf = abuf = Memory(shape=32 * lanes, depth=config.abuf_rows, init=[])
        abuf_x, abuf_table, abuf_write = abuf.read_port(), abuf.read_port(), abuf.write_port()
        x = [abuf_x.data[32 * i:32 * (i + 1)] for i in range(lanes)]
        table = [abuf_table.data[32 * i:32 * (i + 1)] for i in range(lanes)]
        # Operand x is read one cycle before it is used: T4 as source, T6 as S table, T7 as what becomes the addend.
        x_tap = Mux(from_stream, Mux(rotate, valid[at.t - 1], valid[at.sum - 2]), valid[at.y - 1])
        walk_x = walker("x", x_tap, (rotate & from_stream, at.t - 1), (from_stream, at.sum - 2), (1, at.y - 1))
        table_tap = Mux(rotate, valid[at.t - 1], valid[at.v - 1])
        walk_table = walker("table", table_tap, (rotate, at.t - 1), (1, at.v - 1))
        m.d.comb += [
            abuf_x.en.eq(x_tap | ~running),
            abuf_x.addr.eq(Mux(running, Mux(rotate, f.table + f.wrap + walk_x.table, src + walk_x.offset),
                               self.debug_row)),
            self.debug_data.eq(abuf_x.data),
            abuf_table.en.eq(table_tap), abuf_table.addr.eq(f.table + walk_table.table),
        ]

        def hold(values, en, name):
            """The values one cycle later, moved only when ``en``."""
            out = [Signal.like(value, name=f"{name}{i}", reset_less=True) for i, value in enumerate(values)]
            with m.If(en):
                m.d.sync += [o.eq(value) for o, value in zip(out, values)]
            return out

        def later(enable, cycles):
            for _ in range(cycles):
                shifted = Signal()
                m.d.sync += shifted.eq(enable)
                enable = shifted
            return enable

        def lanes_of(kind, name, en, **operands):
            """One component per lane, or one for all of them, lane after lane; returns the results."""
            if not compact:
                results = []
                for i in range(lanes):
                    m.submodules[f"{name}{i}"] = unit = kind()
                    m.d.comb += unit.en.eq(Cat(*en))
                    for port, values in operands.items():
                        m.d.comb += getattr(unit, port).eq(values[i])
                    results.append(unit)
                return results
            m.submodules[name] = unit = kind()
            turns = [[wire(m, later(enable, i), f"{name}_turn{i}") for enable in en] for i in range(lanes)]
            m.d.comb += unit.en.eq(Cat(Cat(enables).any() for enables in zip(*turns)))
            for port, values in operands.items():
                value = values[0]
                for turn, other in zip(turns[1:], values[1:]):
                    value = Mux(turn[0], other, value)
                m.d.comb += getattr(unit, port).eq(value)
            results = []
            for i in range(lanes - 1):
                kept = SimpleNamespace(unit=unit)
                for port in ("o", "saturated"):
                    if port in unit.signature.members:
                        register = Signal.like(getattr(unit, port), name=f"{name}{i}_{port}", reset_less=True)
                        with m.If(later(turns[i][-1], 1)):
                            m.d.sync += register.eq(getattr(unit, port))
                        setattr(kept, port, register)
                results.append(kept)
            return [*results, unit]

        # ---- T0..T4: reconstruct -----------------------------------------------------------------------------------
        acc = hold([self.acc.payload.acc[i] for i in range(lanes)], valid[0], "acc")
        exponent = hold([self.acc.payload.exponent[i] for i in range(lanes)], valid[0], "exponent")
        stream_en = [valid[1 + i] & from_stream for i in range(FromInt.latency)]
        recon = lanes_of(FromInt, "recon", stream_en, a=acc, n=exponent)
        y = [wire(m, Mux(from_stream, unit.o, source), f"y{i}") for i, (unit, source) in enumerate(zip(recon, x))]
        # Results at the largest number are counted as saturated: no other sum comes to exactly there.
        clamped = Signal(lanes)
        m.d.sync += clamped.eq(0)
        with m.If(valid[at.y] & from_stream):
            m.d.sync += clamped.eq(Cat(unit.o[:31] == LARGEST for unit in recon))

        # ---- row scalars -------------------------------------------------------------------------------------------
        m.submodules.rms = rms = Memory(shape=32, depth=config.tokens, init=[])
        m.submodules.inverse = inverse = Memory(shape=32, depth=config.state_rows, init=[])
        rms_write, rms_read, inverse_write, inverse_read = (
            rms.write_port(), rms.read_port(), inverse.write_port(), inverse.read_port())
        walk_scale = walker("scale", valid[at.y - 1], (1, at.y - 1))
        m.d.comb += [
            rms_read.en.eq(valid[at.y - 1]), inverse_read.en.eq(valid[at.y - 1]),
            rms_read.addr.eq(walk_scale.row + Mux(op["vlogits"], first_row, 0)),
            inverse_read.addr.eq(walk_scale.turn * config.tokens + walk_scale.row),
        ]
        row_scale = Mux(f.scale == RowScale.RSQRT, rms_read.data, inverse_read.data)

        # ---- T4..T6: row scale -------------------------------------------------------------------------------------
        scaled = lanes_of(FpMul, "mul_row", [valid[at.y + i] & scale_on for i in range(2)], a=y, b=[row_scale] * lanes)
        plain = hold(hold(y, valid[at.y] & ~scale_on, "y5_"), valid[at.y + 1] & ~scale_on, "y6_")
        t = [wire(m, Mux(scale_on, unit.o, other), f"t{i}") for i, (unit, other) in enumerate(zip(scaled, plain))]

        # ---- T6..T8: rotation, gate --------------------------------------------------------------------------------
        odd = Signal()  # the beat at T6 is an up beat
        with m.If(start):
            m.d.sync += odd.eq(0)
        with m.Elif(valid[at.t] & op["vswiglu"]):
            m.d.sync += odd.eq(~odd)
        gate = hold(t, valid[at.t] & op["vswiglu"] & ~odd, "gate")
        paired = [Signal(name=f"paired{i}") for i in range(at.gated - at.t + 1)]  # paired[i]: a pair is at T6+i
        m.d.comb += paired[0].eq(valid[at.t] & op["vswiglu"] & odd)
        for i in range(at.gated - at.t):
            m.d.sync += paired[i + 1].eq(paired[i])
        swapped = [t[i ^ 1] for i in range(lanes)]
        pair_en = [(valid[at.t + i] & rotate) | paired[i] for i in range(2)]
        gated = op["vswiglu"]
        # Norms, which neither rotate nor gate, square with the first ones.
        v = [Signal(32, name=f"v{i}") for i in range(lanes)]
        first = lanes_of(FpMul, "mul_first", [Mux(norms, valid[at.v + i], en) for i, en in enumerate(pair_en)],
                         a=[Mux(norms, value, Mux(gated, g, o)) for value, g, o in zip(v, gate, t)],
                         b=[Mux(norms, value, Mux(gated, _MINUS_LOG2E, c)) for value, c in zip(v, table)])
        second = lanes_of(FpMul, "mul_second", pair_en, a=[Mux(gated, g, s) for g, s in zip(gate, swapped)],
                          b=[Mux(gated, v, s) for v, s in zip(t, x)])
        straight_en = from_stream & ~rotate & ~gated | op["vnorm"] | op["vprob"]
        straight = hold(hold(t, valid[at.t] & straight_en, "t7_"), valid[at.t + 1] & straight_en, "t8_")

        # ---- softmax state -----------------------------------------------------------------------------------------
        states = config.state_rows
        m.submodules.maximum = maximum = Memory(shape=signed(16), depth=states, init=[])
        m.submodules.minus_maximum = minus_maximum = Memory(shape=32, depth=states, init=[])
        m.submodules.alpha = alpha = Memory(shape=7, depth=states, init=[])
        m.submodules.total = total = Memory(shape=STATE_BITS, depth=states, init=[])
        # States written since VINIT.
        m.submodules.known, m.submodules.summed = known, summed = Flags(count=states), Flags(count=states)
        forget = running & (opcode == _OP["vinit"])
        m.d.comb += [known.clear.eq(forget), summed.clear.eq(forget)]

        # ---- T7: what becomes the addend; T8..T11: add -------------------------------------------------------------
        walk_state = walker("state", valid[at.sum - 2], (1, at.sum - 2))
        minus_read, alpha_read = minus_maximum.read_port(), alpha.read_port()
        m.d.comb += [
            minus_read.en.eq(valid[at.sum - 2]), minus_read.addr.eq(walk_state.state),
            alpha_read.en.eq(valid[at.sum - 2]), alpha_read.addr.eq(walk_state.state),
        ]
        faded = [Mux(alpha_read.data == ALPHA_DROP, 0, scale2(value, -alpha_read.data)) for value in x]
        other = hold([Mux(op["vmerge"], old, Mux(op["vprob"], minus_read.data, value)) for old, value in zip(faded, x)],
                     valid[at.sum - 1] & adds & ~rotate, "addend")
        addend = [Mux(rotate, unit.o, value) for unit, value in zip(second, other)]
        augend = [Mux(rotate, unit.o, value) for unit, value in zip(first, straight)]
        added = lanes_of(FpAdd, "add", [valid[at.sum + i] & adds for i in range(FpAdd.latency)], a=augend, b=addend)
        passes = ~adds & (op["vnorm"] | op["vrope"])
        bypass = straight
        for i in range(at.v - at.sum):
            bypass = hold(bypass, valid[at.sum + i] & passes, f"v{at.sum + 1 + i}_")
        m.d.comb += [out.eq(Mux(adds, unit.o, value)) for out, unit, value in zip(v, added, bypass)]

        # ---- T11..T13: gain, squares; T11..T17: exp2; T8..T20: sigmoid, with the same exp2 -------------------------
        exp_en = [Mux(gated, paired[at.sum - at.t + i], valid[at.v + i] & op["vprob"]) for i in range(Exp2.latency)]
        exp = lanes_of(Exp2, "exp2", exp_en,
                       a=[Mux(gated, Sigmoid.argument(unit.o), value) for unit, value in zip(first, v)])
        shared = iter([exp[-1]] if compact else exp)
        sigmoid = lanes_of(lambda: Sigmoid(exp2=next(shared)), "sigmoid",
                           [paired[at.sum - at.t + i] for i in range(Sigmoid.latency)], a=[unit.o for unit in first])
        product = [unit.o for unit in second]
        for i in range(Sigmoid.latency):
            product = hold(product, paired[at.sum - at.t + i], f"product{at.sum + 1 + i}_")
        gain_en = [Mux(gated, paired[at.gates - at.t + i], valid[at.v + i] & norms) for i in range(2)]
        gained = lanes_of(FpMul, "mul_gain", gain_en, a=[Mux(gated, p, value) for p, value in zip(product, v)],
                          b=[Mux(gated, s.o, g) for s, g in zip(sigmoid, table)])
        terms = lanes_of(lambda: ToFixed(fraction=SUM_FRACTION, limit=_TERM_LIMIT), "square_fixed",
                         [valid[at.gain + i] & norms for i in range(2)], a=[unit.o for unit in first])
        prob = [unit.o for unit in exp]
        prob_terms = lanes_of(lambda: ToFixed(fraction=PROB_FRACTION, limit=PROB_FRACTION), "prob_fixed",
                              [valid[at.prob + i] & op["vprob"] for i in range(2)], a=prob)

        # ---- sums: squares at T15, probabilities at T19 ------------------------------------------------------------
        m.submodules.sums = sums = Memory(shape=SUM_BITS, depth=config.tokens, init=[])
        sum_old, sum_new = sums.read_port(domain="comb"), sums.write_port()
        walk_sum = walker("sum", valid[at.squares + 1] & norms, (1, at.squares + 1))
        beat_sum = Signal(SUM_BITS)
        with m.If(valid[at.squares] & norms):
            m.d.sync += beat_sum.eq(tree_sum([unit.o for unit in terms]))
        sum_value, sum_wide = Signal(SUM_BITS), Signal(SUM_BITS + 1)
        top = (1 << (SUM_BITS - 1)) - 1
        m.d.comb += [
            sum_old.addr.eq(walk_sum.row), sum_new.addr.eq(walk_sum.row), sum_new.en.eq(valid[at.squares + 1] & norms),
            sum_wide.eq(beat_sum + Mux(walk_sum.row_begins, 0, sum_old.data)),
            sum_value.eq(Mux(sum_wide > top, top, sum_wide)), sum_new.data.eq(sum_value),
        ]
        total_old, total_new = total.read_port(domain="comb"), total.write_port()
        walk_total = walker("total", valid[at.probs + 1] & op["vprob"], (1, at.probs + 1))
        prob_sum = Signal(PROB_FRACTION + 1 + lanes.bit_length())
        with m.If(valid[at.probs] & op["vprob"]):
            m.d.sync += prob_sum.eq(tree_sum([unit.o for unit in prob_terms]))
        alpha_total = alpha.read_port(domain="comb")
        total_value, carried = Signal(STATE_BITS), Signal(STATE_BITS)
        state = walk_total.state
        m.d.comb += [
            alpha_total.addr.eq(state), total_old.addr.eq(state), total_new.addr.eq(state),
            total_new.en.eq(valid[at.probs + 1] & op["vprob"]),
            summed.index.eq(state), summed.set.eq(total_new.en),
            carried.eq(Mux(walk_total.row_begins,
                           Mux(summed.is_set, total_old.data >> alpha_total.data, 0), total_old.data)),
            total_value.eq(carried + prob_sum), total_new.data.eq(total_value),
        ]

        # ---- router scores, beside the squares: products at T13, terms at T15, decisions at T17 --------------------
        m.submodules.rbuf = rbuf = Memory(shape=data.ArrayLayout(data.ArrayLayout(16, 2), lanes),
                                          depth=config.router_rows, init=[])
        rbuf_read, rbuf_write = rbuf.read_port(), rbuf.write_port()
        m.d.comb += [
            rbuf_read.en.eq(valid[at.v - 1] & scoring), rbuf_read.addr.eq(first_row + walk_table.beat),
            rbuf_write.en.eq(self.load.valid & self.load.ready & self.load.payload.addr[15]),
            rbuf_write.addr.eq(self.load.payload.addr), rbuf_write.data.eq(self.load.payload.data),
        ]
        if compact:
            walk_scores = walker("scores", 0, (1, at.v))
            m.submodules.scores = unit = SharedScores(config=config)
            scores_busy = unit.busy
            m.d.comb += [
                unit.en.eq(valid[at.v] & scoring), unit.row.eq(walk_scores.row), unit.first.eq(walk_scores.row_begins),
                unit.last.eq(walk_scores.row_last), unit.bias[0].eq(bias[0]), unit.bias[1].eq(bias[1]),
                self.decided_attention.eq(unit.decided[0]), self.decided_mlp.eq(unit.decided[1]),
                *(unit.v[i].eq(v[i]) for i in range(lanes)),
                *(unit.weight[module][i].eq(rbuf_read.data[i][module]) for module in range(2) for i in range(lanes)),
            ]
        for module, decided in enumerate(() if compact else (self.decided_attention, self.decided_mlp)):
            m.submodules[f"scores{module}"] = unit = RouterScores(config=config)
            m.d.comb += [
                unit.en.eq(Cat(valid[at.v + i] & scoring for i in range(RouterScores.latency))),
                unit.row.eq(walk_sum.row), unit.first.eq(walk_sum.row_begins), unit.last.eq(walk_sum.row_last),
                unit.bias.eq(bias[module]), decided.eq(unit.decided),
            ]
            m.d.comb += [unit.v[i].eq(v[i]) for i in range(lanes)]
            m.d.comb += [unit.weight[i].eq(rbuf_read.data[i][module]) for i in range(lanes)]

        # ---- scalars of finished rows: 1/rms in 13 cycles, 1/sum in 8 ------------------------------------------------
        scalar_in = Signal()
        scalar_depth = FromInt.latency + FpMul.latency + FpAdd.latency + Rsqrt.latency
        scalar_index = [Signal(range(max(states, config.tokens)), name=f"scalar_index{i}")
                        for i in range(scalar_depth + 1)]
        scalar_valid = [Signal(name=f"scalar_valid{i}") for i in range(scalar_depth + 1)]
        scalar_value = Signal(SUM_BITS)
        m.d.comb += scalar_in.eq((sum_new.en & walk_sum.row_last) | (total_new.en & walk_total.row_last))
        m.d.sync += scalar_valid[0].eq(scalar_in)
        with m.If(scalar_in):
            m.d.sync += [scalar_value.eq(Mux(norms, sum_value, total_value)),
                         scalar_index[0].eq(Mux(norms, walk_sum.row, state))]
        for i in range(scalar_depth):
            m.d.sync += scalar_valid[i + 1].eq(scalar_valid[i])
            with m.If(scalar_valid[i]):
                m.d.sync += scalar_index[i + 1].eq(scalar_index[i])
        m.submodules.scalar_float = scalar_float = FromInt(unsigned(SUM_BITS - 1))
        m.submodules.scalar_mul = scalar_mul = FpMul()
        m.submodules.scalar_add = scalar_add = FpAdd()
        m.submodules.scalar_rsqrt = scalar_rsqrt = Rsqrt()
        m.submodules.scalar_recip = scalar_recip = Recip()
        at_mul, at_add = FromInt.latency, FromInt.latency + FpMul.latency
        at_rsqrt = at_add + FpAdd.latency
        was_norm = Signal()
        with m.If(scalar_in):
            m.d.sync += was_norm.eq(norms)

        def taps(at, latency):
            return Cat(*scalar_valid[at:at + latency])

        recip_done = at_mul + Recip.latency
        m.d.comb += [
            scalar_float.en.eq(taps(0, FromInt.latency)), scalar_float.a.eq(scalar_value),
            scalar_float.n.eq(Mux(was_norm, -SUM_FRACTION, -PROB_FRACTION)),
            scalar_mul.en.eq(taps(at_mul, FpMul.latency)), scalar_mul.a.eq(scalar_float.o), scalar_mul.b.eq(inv_n),
            scalar_add.en.eq(taps(at_add, FpAdd.latency)), scalar_add.a.eq(scalar_mul.o), scalar_add.b.eq(eps),
            scalar_rsqrt.en.eq(taps(at_rsqrt, Rsqrt.latency)), scalar_rsqrt.a.eq(scalar_add.o),
            scalar_recip.en.eq(taps(at_mul, Recip.latency)), scalar_recip.a.eq(scalar_float.o),
            rms_write.en.eq(scalar_valid[scalar_depth] & was_norm), rms_write.addr.eq(scalar_index[scalar_depth]),
            rms_write.data.eq(scalar_rsqrt.o),
            inverse_write.en.eq(scalar_valid[recip_done] & ~was_norm),
            inverse_write.addr.eq(scalar_index[recip_done]), inverse_write.data.eq(scalar_recip.o),
            scalar_busy.eq(scalar_in | Cat(*scalar_valid).any() | valid[at.squares] | valid[at.squares + 1]),
        ]

        # ---- scores: mask at T4, maximum of the beat at T6, its ceiling at T7, state at the end of a row -----------
        walk_mask = walker("mask", valid[at.y] & op["vscore"], (1, at.y))
        # the first column that does not count: limit + row + 1
        end = wire(m, limit - ~Cat(walk_mask.row, Const(0, 1)).as_signed(), "end")
        allowed = [wire(m, value, f"allowed{i}") for i, value in enumerate(_counted(m, walk_mask.beat, end, lanes))]
        masked = [Mux(ok, value, LOWEST) for ok, value in zip(allowed, y)]
        open_lanes = Signal()
        score = hold(masked, valid[at.y] & op["vscore"], "score")
        with m.If(valid[at.y] & op["vscore"]):
            m.d.sync += open_lanes.eq(allowed[0])
        highest, highest_open = Signal(32), Signal()
        with m.If(valid[at.y + 1] & op["vscore"]):
            m.d.sync += [highest.eq(_largest(m, score)), highest_open.eq(open_lanes)]
        ceiling, any_open = Signal(signed(16)), Signal()
        with m.If(valid[at.y + 2] & op["vscore"]):
            m.d.sync += [ceiling.eq(_ceil(m, highest)), any_open.eq(highest_open)]
        at_maximum = valid[at.y + 3] & op["vscore"]
        walk_max = walker("max", at_maximum, (1, at.y + 3))
        best, best_open = Signal(signed(16)), Signal()
        best_now, open_now = Signal(signed(16)), Signal()
        first_beat = walk_max.row_begins
        better = any_open & (first_beat | ~best_open | (ceiling > best))
        m.d.comb += [
            best_now.eq(Mux(better, ceiling, best)), open_now.eq(any_open | (best_open & ~first_beat)),
        ]
        maximum_old, maximum_new = maximum.read_port(domain="comb"), maximum.write_port()
        alpha_new, minus_new = alpha.write_port(), minus_maximum.write_port()
        old_maximum, new_maximum, step = Signal(signed(16)), Signal(signed(16)), Signal(signed(17))
        row_done = Signal()
        m.d.comb += [
            known.index.eq(walk_max.state), known.set.eq(row_done),
            row_done.eq(at_maximum & walk_max.row_last),
            maximum_old.addr.eq(walk_max.state), maximum_new.addr.eq(walk_max.state), alpha_new.addr.eq(walk_max.state),
            old_maximum.eq(Mux(known.is_set, maximum_old.data, MAXIMUM_INIT)),
            new_maximum.eq(Mux(open_now & (best_now > old_maximum), best_now, old_maximum)),
            step.eq(new_maximum - old_maximum),
            maximum_new.en.eq(row_done), maximum_new.data.eq(new_maximum),
            alpha_new.en.eq(row_done),
            alpha_new.data.eq(Mux(old_maximum == MAXIMUM_INIT, ALPHA_DROP, Mux(step > 126, 126, step))),
        ]
        with m.If(at_maximum):
            m.d.sync += [best.eq(best_now), best_open.eq(open_now)]
        m.submodules.minus_float = minus_float = FromInt(signed(17))
        minus_valid = [Signal(name=f"minus_valid{i}") for i in range(FromInt.latency + 1)]
        minus_state = [Signal(range(states), name=f"minus_state{i}") for i in range(FromInt.latency + 1)]
        negated = Signal(signed(17))
        with m.If(row_done):
            m.d.sync += negated.eq(-new_maximum)
        chain = [row_done, *minus_valid]
        for i in range(FromInt.latency + 1):
            m.d.sync += minus_valid[i].eq(chain[i])
            with m.If(chain[i]):
                m.d.sync += minus_state[i].eq(walk_max.state if i == 0 else minus_state[i - 1])
        m.d.comb += [
            minus_float.en.eq(Cat(*minus_valid[:-1])), minus_float.a.eq(negated), minus_float.n.eq(0),
            minus_new.en.eq(minus_valid[-1]), minus_new.addr.eq(minus_state[-1]), minus_new.data.eq(minus_float.o),
        ]

        # ---- results -----------------------------------------------------------------------------------------------
        walk_prob = walker("prob", valid[at.prob] & op["vprob"], (1, at.prob))
        m.d.comb += self.exponent_head.eq(walk_prob.head)
        token_exponents = [
            Array([self.exponents.word_select(c * lanes + i, 5) for c in range(vectors)])[walk_prob.column]
            for i in range(lanes)]
        weighted = [scale2(value, Cat(e, Const(0, 1)).as_signed() - 25) for value, e in zip(prob, token_exponents)]

        out_valid, out = Signal(), [Signal(32, name=f"out{i}") for i in range(lanes)]
        gain_valid = valid[at.gain] & norms
        with m.If(gated):
            m.d.comb += out_valid.eq(paired[at.gated - at.t])
        with m.Elif(op["vrope"]):
            m.d.comb += out_valid.eq(valid[at.v])
        with m.Elif(op["vprob"]):
            m.d.comb += out_valid.eq(valid[at.prob])
        with m.Elif(op["vscale"]):
            m.d.comb += out_valid.eq(valid[at.t])
        with m.Else():
            m.d.comb += out_valid.eq(gain_valid)
        for i in range(lanes):
            m.d.comb += out[i].eq(Mux(op["vrope"], v[i], Mux(op["vprob"], weighted[i],
                                                             Mux(op["vscale"], t[i], gained[i].o))))

        # ABUF: vadd and vmerge at T11, vscore at T5; the load unit writes when the pipeline does not.
        abuf_valid = Mux(op["vscore"], valid[at.y + 1], valid[at.v]) & to_abuf
        walk_abuf = walker("abuf", abuf_valid, (op["vscore"], at.y + 1), (1, at.v))
        m.d.comb += [
            self.load.ready.eq(~abuf_valid),
            abuf_write.en.eq(abuf_valid | (self.load.valid & ~self.load.payload.addr[15])),
            abuf_write.addr.eq(Mux(abuf_valid, src + walk_abuf.offset, self.load.payload.addr)),
            abuf_write.data.eq(Mux(abuf_valid, Mux(op["vscore"], Cat(*score), Cat(*v)), self.load.payload.data)),
        ]

        # MBUF: gather beats into a row of lanes, align its blocks.
        per_row = config.lanes // lanes
        walk_out = walker("out", out_valid, loops=nest_out)
        place = Signal(range(max(per_row, 2)))
        address = Signal(16)
        m.d.comb += [address.eq(dst + walk_out.offset),
                     place.eq(address[:(per_row - 1).bit_length()] if per_row > 1 else 0)]
        gathered = [Signal(32, name=f"gathered{k}", reset_less=True) for k in range(config.lanes)]
        for part in range(per_row):
            with m.If(out_valid & to_mbuf & (place == part)):
                m.d.sync += [gathered[part * lanes + i].eq(out[i]) for i in range(lanes)]
        shift = (per_row - 1).bit_length()
        aligning = [Signal(name=f"aligning{i}") for i in range(BlockAlign.latency + 1)]
        target = data.StructLayout({"row": range(config.mbuf_rows), "vector": range(config.mbuf_rows), "first": 1})
        targets = [Signal(target, name=f"target{i}") for i in range(BlockAlign.latency + 1)]
        m.d.sync += aligning[0].eq(out_valid & to_mbuf & (place == per_row - 1))
        with m.If(out_valid & to_mbuf):
            m.d.sync += [
                targets[0].row.eq(address >> shift), targets[0].vector.eq((address - walk_out.place) >> shift),
                targets[0].first.eq((walk_out.place >> shift) == 0),
            ]
        for i in range(BlockAlign.latency):
            m.d.sync += aligning[i + 1].eq(aligning[i])
            with m.If(aligning[i]):
                m.d.sync += targets[i + 1].eq(targets[i])
        for b in range(config.blocks):
            m.submodules[f"align{b}"] = align = BlockAlign(block=config.block)
            m.d.comb += [align.en.eq(Cat(*aligning[:-1])), align.short.eq(op["vrope"] | op["vprob"]),
                         self.write_data.exponent[b].eq(align.e), self.write_data.sum[b].eq(align.s)]
            for k in range(config.block):
                m.d.comb += [align.a[k].eq(gathered[b * config.block + k]),
                             self.write_data.mantissa[b * config.block + k].eq(align.m[k])]
        m.d.comb += [
            self.write_en.eq(aligning[-1]), self.write_row.eq(targets[-1].row),
            self.write_vector.eq(targets[-1].vector), self.write_first.eq(targets[-1].first),
        ]

        # KVOUT: FP16 rows of one port beat.
        per_beat = config.beat_elements // lanes
        m.submodules.kvout = kvout = Memory(shape=data.ArrayLayout(16 * lanes, per_beat), depth=config.kvout_rows,
                                            init=[])
        kv_write, kv_read = kvout.write_port(granularity=1), kvout.read_port()
        half_valid = [valid[at.v + i] & to_kvout for i in range(ToHalf.latency)]
        halves = lanes_of(ToHalf, "half", half_valid, a=v)
        kv_valid = valid[at.halves] & to_kvout
        walk_kv = walker("kv", kv_valid, (1, at.halves))
        kv_address = Signal(16)
        kv_shift = (per_beat - 1).bit_length()
        m.d.comb += [
            kv_address.eq(dst + walk_kv.offset), kv_write.addr.eq(kv_address >> kv_shift),
            kv_read.en.eq(1), kv_read.addr.eq(self.kvout_row), self.kvout_data.eq(kv_read.data.as_value()),
            self.saturated.eq(Mux(kv_valid, sum(unit.saturated for unit in halves), 0) + sum(clamped)),
        ]
        for part in range(per_beat):
            m.d.comb += [
                kv_write.en[part].eq(kv_valid & ((kv_address[:kv_shift] == part) if kv_shift else 1)),
                kv_write.data[part].eq(Cat(*(unit.o for unit in halves))),
            ]

        # Logits: to the store unit, largest of the last row.
        m.submodules.logits_fifo = queue = fifo.SyncFIFOBuffered(width=32 * lanes, depth=32)
        logits_valid = valid[at.t] & op["vlogits"]
        m.d.comb += [
            queue.w_en.eq(logits_valid), queue.w_data.eq(Cat(*t)), logits_space.eq(queue.level < 32 - at.t - 4),
            self.logits.valid.eq(queue.r_rdy), self.logits.payload.eq(queue.r_data), queue.r_en.eq(self.logits.ready),
        ]
        walk_logits = walker("logits", logits_valid, (1, at.t))
        candidates = hold(t, logits_valid, "logit")
        beat7, counts7 = Signal(16), Signal()
        with m.If(logits_valid):
            m.d.sync += [beat7.eq(walk_logits.beat), counts7.eq(walk_logits.final_row)]
        logits7, logits8 = Signal(), Signal()
        best_index, best_key = Signal(range(max(lanes, 2))), Signal(signed(32))
        beat8 = Signal(16)
        m.d.sync += [logits7.eq(logits_valid), logits8.eq(logits7 & counts7)]
        with m.If(logits7 & counts7):
            index, key = _argmax(m, zip(_counted(m, beat7, imm.as_signed(), lanes), candidates))
            m.d.sync += [best_index.eq(index), best_key.eq(key), beat8.eq(beat7)]
        winner = Signal(signed(32))
        with m.If(logits8 & (fresh_argmax | (best_key > winner))):
            m.d.sync += [winner.eq(best_key), self.argmax.eq(Cat(best_index[:lanes.bit_length() - 1], beat8)),
                         fresh_argmax.eq(0)]
        m.d.comb += self.argmax_value.eq(_unkey(winner))

        m.d.comb += tail_busy.eq(Cat(
            *aligning, *paired[1:], kv_valid, logits7, logits8, *minus_valid, scores_busy if compact else ()).any())
        return m


def _travelled(m, walk, places, found):
    """The outputs of a walker as they were when the beat that is at one of the places was issued."""
    def there(name, position):
        if (name, position) not in found:
            before = there(name, position - 1) if position else None
            found[name, position] = here = getattr(walk, name) if before is None else Signal.like(
                before, name=f"{name}_at{position}", reset_less=True)
            if before is not None:
                m.d.sync += here.eq(before)
        return found[name, position]

    outputs = {}
    for name in (name for name, member in walk.signature.members.items() if member.flow is Out):
        *others, (_, position) = places
        outputs[name] = there(name, position)
        for condition, position in reversed(others):
            outputs[name] = Mux(condition, there(name, position), outputs[name])
    return SimpleNamespace(**outputs)


def _counted(m, beat, end, lanes):
    """Of each lane whether its column, ``beat * lanes + lane``, is below ``end`` (signed)."""
    beats = (lanes - 1).bit_length()
    whole = end[beats:].as_signed()
    before = wire(m, Cat(beat, Const(0, 1)).as_signed() < whole, "whole_beat")
    at_end = wire(m, Cat(beat, Const(0, 1)).as_signed() == whole, "part_of_beat")
    return [*(before | (at_end & (end[:beats] > i)) for i in range(lanes - 1)), before]


def _key(bits):
    """FP32 bits as a signed 32-bit integer with the same order (no NaN, no -0)."""
    return Cat(bits[:31] ^ bits[31].replicate(31), bits[31]).as_signed()


def _unkey(key):
    """FP32 bits of an ordered key, unsigned."""
    return _key(key).as_unsigned()


def _largest(m, values):
    """The largest of FP32 values."""
    keys = [wire(m, _key(value), f"key{i}") for i, value in enumerate(values)]
    while len(keys) > 1:
        keys = [wire(m, Mux(keys[i + 1] > keys[i], keys[i + 1], keys[i]), f"larger{len(keys)}_{i}")
                if i + 1 < len(keys) else keys[i] for i in range(0, len(keys), 2)]
    return _unkey(keys[0])


def _argmax(m, pairs):
    """(index, key) of the largest value among those that count; lowest index wins. None counts: (0, lowest)."""
    lowest = _key(Const(LOWEST, 32))
    entries = [(Const(i), wire(m, Mux(counts, _key(value), lowest), f"logit_key{i}"))
               for i, (counts, value) in enumerate(pairs)]
    while len(entries) > 1:
        merged = []
        for i in range(0, len(entries), 2):
            if i + 1 == len(entries):
                merged.append(entries[i])
                continue
            (index_a, key_a), (index_b, key_b) = entries[i], entries[i + 1]
            later = wire(m, key_b > key_a, f"later{len(entries)}_{i}")
            merged.append((wire(m, Mux(later, index_b, index_a), f"best_index{len(entries)}_{i}"),
                           wire(m, Mux(later, key_b, key_a), f"best_key{len(entries)}_{i}")))
        entries = merged
    return entries[0]


def _ceil(m, bits):
    """Ceiling of an FP32 value, clamped to -16384..16383, as a signed 16-bit value."""
    exponent, significand = bits[23:31], Cat(bits[:23], Const(1, 1))
    whole, rest = Signal(15), Signal()
    shift = Signal(5)
    small, large = exponent < 127, exponent >= 127 + 14
    wide = Signal(24 + 14)
    m.d.comb += [
        shift.eq(exponent - 127),
        wide.eq(significand << shift[:4]),
        whole.eq(Mux(small, 0, wide[23:])),
        rest.eq(Mux(small, exponent != 0, wide[:23].any())),
    ]
    up = Signal(signed(17))
    m.d.comb += up.eq(Mux(bits[31], -whole, whole + rest))
    return Mux(large, Mux(bits[31], -16384, 16383), Mux(up > 16383, 16383, up))

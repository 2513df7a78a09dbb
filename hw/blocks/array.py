"""The PE array: exact integer dot products of one MBUF row with every column of a tile, scaled and accumulated.

Stages (`docs/numerics.md`, Weights; `docs/pe-array.md`):
1. dot: D[column, block] = sum of mantissa * code, exact (`dot.py`).
2. scale: D * sig, shift amount = (emax - e) + (scale_exponent - es).
3. shift right (floor), add the minimum term and the blocks.
4. accumulate: add to the accumulator row, write it back.

The accumulators have two banks: one accumulates while the other drains, or one does both in turn. How many cycles the
stages take depends on the multipliers; rows, tiles and scales enter, and results are ready, at the same time with all.

With ``passes`` a small array serves all columns, some in each of as many cycles: everything but the tile and the
accumulators is there once for `at_once` columns. Rows then follow each other at a distance of as many cycles.
"""

from types import SimpleNamespace

from amaranth import Array, Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..emission import place
from ..formats import ACC_BITS, CODE_BITS, KV_FRACTION, MANTISSA_BITS
from .dot import BIAS_BITS, DotPair, dot_latency, skew, word_bits
from .dsp import W_C, XY_M, Z_ZERO, Dsp48e2
from .mbuf import AlignedRow, sum_shape
from .trees import tree_sum

__all__ = ["ColumnPair", "PeArray", "RowControl", "Scale", "at_once", "tile_beats"]

_SIGNIFICAND_BITS = 13
_SCALED_BITS = 38
_MULTIPLIER_BITS = 18  # of an operand


def Scale():
    """A column's scale or minimum of one block as it enters the array: signed significand, scale_exponent - es (0..63).

    The significand of a scale is less 2^KV_FRACTION: keys and values have 0, and their dot products need no multiplier.
    """
    return data.StructLayout({"significand": signed(_SIGNIFICAND_BITS), "shift": unsigned(6)})


def RowControl(config):
    """What travels with a row through the stages."""
    return data.StructLayout({
        "acc": range(2 * config.acc_rows),  # accumulator row, bank in the top bit
        "first": 1,  # first k: the old accumulator is not added
        "signed_codes": 1,  # codes are -8..7, not 0..15
        "minimum": 1,  # add minimum * S
        "last": 1,  # last row of a column tile: it may drain
    })


def tile_beats(config):
    """Superbeats of codes, and steps of the KV buffer, that fill a tile: (of codes, of keys, of values)."""
    step, elements = config.kv_step, config.beat_elements
    return (config.tile_beats,
            (config.columns // step) * (config.lanes // elements),
            (config.lanes // step) * (config.columns // elements))


def at_once(config):
    """Columns that the array computes in one cycle."""
    return config.columns // config.passes


def _times(config):
    """When things happen, in cycles after a row enters."""
    if _stepwise(config):
        return SimpleNamespace(row=1, scaled=11, shifted=12, added=13)
    return SimpleNamespace(row=0, scaled=2, shifted=2, added=3)


def _stepwise(config):
    """Whether the stages run in every cycle, a register behind each step; else they wait for a row, a register each."""
    return config.dsp == "dsp48e2"


def _delay(m, value, cycles, name, reset_less=True):
    """The value ``cycles`` later. What says that something happens must not outlive a reset."""
    for age in range(1, cycles + 1):
        later = Signal.like(value, name=f"{name}_{age}", reset_less=reset_less)
        m.d.sync += later.eq(value)
        value = later
    return value


class ColumnPair(wiring.Component):
    """Two columns: tile registers, dot products, scaling and accumulators; with passes two in each of them.

    Members
    -------
    mantissa : per lane; code (less 8), key, value : what may go to each word (keys and values have one source if they
        come in the same places); load : a word is written, load_code, load_value : with a code, with a value; all of
        them at the row's time plus the lane's `skew`. Words of a pass follow those of the one before
    turn, acc_turn, drain_turn : the pass at the row's time, of what is accumulated, of what is drained
    bias : added to the dot products of a block, at the row's time
    scale, minimum, exponent_gap : one cycle after the row
    sum : of a block's mantissas, or 0 where no minimum is added, when the dot products are ready
    acc_en, acc_row, acc_first : when the contribution is ready; drain_row, drain : any row of a bank in which the one
        that accumulates is the first or there is none, combinational
    dot_en, scale_en, shift_en : not with "dsp48e2": nothing moves without a row
    """

    def __init__(self, *, config):
        self.config = config
        lanes, blocks, acc_row = config.lanes, config.blocks, range(2 * config.acc_rows)
        word, words = signed(word_bits(config.dsp)), 2 * config.passes
        members = {
            "mantissa": In(signed(32 if config.dsp == "generic" else 16)).array(lanes),
            "code": In(CODE_BITS).array(words, lanes),
            **{name: In(word).array(words, lanes)
               for name in (("key",) if _shared_source(config) else ("key", "value"))},
            "load": In(1).array(words, lanes), "load_code": In(1).array(words, lanes),
            "bias": In(signed(BIAS_BITS)).array(blocks),
            "scale": In(Scale()).array(2, blocks), "minimum": In(Scale()).array(2, blocks),
            "exponent_gap": In(6).array(blocks), "sum": In(sum_shape(config)).array(blocks),
            "acc_en": In(1), "acc_row": In(acc_row), "acc_first": In(1),
            "drain_row": In(acc_row), "drain": Out(signed(ACC_BITS)).array(2),
        }
        if not _shared_source(config):
            members["load_value"] = In(1).array(words, lanes)
        if config.passes > 1:
            members |= dict.fromkeys(("turn", "acc_turn", "drain_turn"), In(range(config.passes)))
        if not _stepwise(config):
            members |= {"dot_en": In(1), "scale_en": In(1), "shift_en": In(1)}
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        config = self.config
        words = self._tile(m)
        terms = [[], []]
        for b in range(config.blocks):
            first = b * config.block
            m.submodules[f"dot{b}"] = dot = DotPair(lanes=config.block, dsp=config.dsp)
            m.d.comb += dot.bias.eq(self.bias[b])
            for k in range(config.block):
                m.d.comb += [dot.mantissa[k].eq(self.mantissa[first + k]),
                             *(dot.word[c][k].eq(words[c][first + k]) for c in range(2))]
            if not _stepwise(config):
                m.d.comb += dot.en.eq(self.dot_en)
            for c in range(2):
                terms[c] += self._scaled(m, dot.dot[c], b, c)
        for c in range(2):
            contribution = Signal(signed(ACC_BITS), name=f"contribution{c}", reset_less=True)
            if not _stepwise(config):
                with m.If(self.shift_en):
                    m.d.sync += contribution.eq(tree_sum(value >> amount for value, amount in terms[c]))
            else:
                shifted = [_delay(m, value >> amount, 1, f"shifted{c}_{i}")
                           for i, (value, amount) in enumerate(terms[c])]
                m.d.sync += contribution.eq(tree_sum(shifted))
            self._accumulate(m, c, contribution)
        return m

    def _tile(self, m):
        """The words of this cycle [column][lane], from the tile registers. A code leaves zeros in front of it, which
        costs a reset, not a gate."""
        words = [[Signal(signed(word_bits(self.config.dsp)), name=f"word{c}_{k:02}", reset_less=True)
                  for k in range(self.config.lanes)] for c in range(2 * self.config.passes)]
        for c, column in enumerate(words):
            for k, word in enumerate(column):
                code, number = self.code[c][k] ^ (1 << CODE_BITS - 1), self.key[c][k]
                if not _shared_source(self.config):
                    number = Mux(self.load_value[c][k], self.value[c][k], number)
                if self.config.dsp == "generic":
                    with m.If(self.load[c][k]):
                        m.d.sync += word.eq(Mux(self.load_code[c][k], code, number.as_unsigned()))
                    continue
                with m.If(self.load[c][k]):
                    m.d.sync += word[:CODE_BITS].eq(Mux(self.load_code[c][k], code, number[:CODE_BITS]))
                with m.If(self.load_code[c][k]):
                    m.d.sync += word[CODE_BITS:].eq(0)
                with m.Elif(self.load[c][k]):
                    m.d.sync += word[CODE_BITS:].eq(number[CODE_BITS:])
        if self.config.passes == 1:
            return words
        return [[Array(word[k] for word in words[c::2])[self.turn] for k in range(self.config.lanes)]
                for c in range(2)]

    def _scaled(self, m, dot, b, c):
        """(value, shift) of the weights and of the minimum, at the same time."""
        config, times = self.config, _times(self.config)
        scale, minimum, gap = self.scale[c][b], self.minimum[c][b], self.exponent_gap[b]
        scaled = Signal(signed(_SCALED_BITS), name=f"scaled{b}_{c}", reset_less=True)
        generic, amounts = config.dsp == "generic", []
        for name, part in (("shift", scale), ("shift_minimum", minimum)):
            total = Signal(7, name=f"{name}_total{b}_{c}")
            amount = Signal(7 if generic else 6, name=f"{name}{b}_{c}", reset_less=True)
            m.d.comb += total.eq(gap + part.shift)
            # 63 places leave the sign alone, and so do more: a narrow shifter wants a limit, a simulator does not.
            amounts.append((amount, total if generic else Mux(total[6], 63, total)))
        if not _stepwise(config):
            lowest = Signal(signed(33), name=f"scaled_minimum{b}_{c}", reset_less=True)
            with m.If(self.scale_en):
                m.d.sync += [
                    scaled.eq((dot << KV_FRACTION) + self._product(dot, scale.significand)),
                    lowest.eq(self.sum[b] * minimum.significand),
                    *(amount.eq(total) for amount, total in amounts),
                ]
            return [(scaled, amounts[0][0]), (lowest, amounts[1][0])]
        m.d.sync += [amount.eq(total) for amount, total in amounts]
        wait = times.row + dot_latency(config.dsp)
        significand, significand_minimum = (
            _delay(m, part.significand, wait - 1, f"significand{number}_{b}_{c}")
            for number, part in enumerate((scale, minimum)))
        # The product takes 27 bits of the dot product: enough for codes, and keys and values have significand 0.
        m.submodules[f"scale{b}_{c}"] = dsp = Dsp48e2(
            opmode=XY_M | W_C | Z_ZERO, registers={"a": 0, "d": 0, "ad": 0, "b": 0})
        m.d.comb += [dsp.a.eq(dot), dsp.b.eq(significand), dsp.c.eq(dot << KV_FRACTION), scaled.eq(dsp.p)]
        lowest = _delay(m, self.sum[b] * significand_minimum, 2, f"minimum{b}_{c}")
        return [(value, _delay(m, amount, times.scaled - 2, f"amount{number}_{b}_{c}"))
                for number, (value, (amount, _)) in enumerate(zip((scaled, lowest), amounts))]

    def _product(self, dot, significand):
        """dot * significand; keys and values have significand 0, so that the bits of a sum of codes are enough."""
        if self.config.dsp == "generic":
            return dot * significand
        bits = MANTISSA_BITS + CODE_BITS + (self.config.block - 1).bit_length()
        low = min(bits, _MULTIPLIER_BITS) - 1  # the rest, a few bits, needs no multiplier of its own
        return dot[:low] * significand + ((dot[low:bits].as_signed() * significand) << low)

    def _accumulate(self, m, c, contribution):
        """Two memories of one port each way: what is added to leaves the other one to drain."""
        old = []
        bank, address, drain_bank, drain_address = (
            self.acc_row[-1], self.acc_row[:-1], self.drain_row[-1], self.drain_row[:-1])
        if self.config.passes > 1:
            address, drain_address = Cat(address, self.acc_turn), Cat(drain_address, self.drain_turn)
        total = Signal(signed(ACC_BITS), name=f"total{c}")
        for number in range(2):
            m.submodules[f"acc{c}_{number}"] = acc = Memory(
                shape=signed(ACC_BITS), depth=self.config.acc_rows * self.config.passes, init=[])
            read, write = acc.read_port(domain="comb"), acc.write_port()
            mine = Signal(name=f"accumulates{c}_{number}")
            m.d.comb += [mine.eq(self.acc_en & (bank == number)),
                         read.addr.eq(Mux(mine & ~self.acc_first, address, drain_address)),
                         write.addr.eq(address), write.en.eq(mine), write.data.eq(total)]
            old.append(read.data)
        m.d.comb += [total.eq(contribution + Mux(self.acc_first, 0, Mux(bank, old[1], old[0]))),
                     self.drain[c].eq(Mux(drain_bank, old[1], old[0]))]


def _shared_source(config):
    """Whether keys and values come in the same places, once blocks of E tokens of values are transposed."""
    return config.dsp != "generic" and config.kv_step // config.beat_elements in (1, 2)


class PeArray(wiring.Component):
    """All columns, fed row by row.

    Members
    -------
    codes, load_codes : superbeat of 4-bit codes; bit j of load_codes: it is the j-th of the next tile
    mantissas, load_keys, load_values : step of the KV buffer, and which one of a K or V tile it is
    swap : the next tile, loaded before, is in use for rows that enter in later cycles; another one may be loaded
    row_en, row, maximum, control : an MBUF row enters (stage 1), with its vector's largest exponent
    scale, minimum : scales of the tile in use, valid one cycle after row_en of its rows; with passes those of the
        columns of scale_turn (combinational)
    tile_done : every row of a column tile is in the accumulators (`latency` cycles after its last row)
    drain_row, drain : accumulators of one row (combinational), but not while drain_busy; with passes those of
        drain_turn
    """

    latency = 14

    def __init__(self, *, config):
        self.config = config
        codes, keys, values = tile_beats(config)
        super().__init__({
            "codes": In(8 * config.superbeat_bytes),
            "mantissas": In(word_bits(config.dsp) * config.kv_step * config.beat_elements),
            "load_codes": In(codes), "load_keys": In(keys), "load_values": In(values), "swap": In(1),
            "row_en": In(1), "row": In(AlignedRow(config)), "maximum": In(signed(9)), "control": In(RowControl(config)),
            "scale": In(Scale()).array(at_once(config), config.blocks),
            "minimum": In(Scale()).array(at_once(config), config.blocks),
            "tile_done": Out(1), "drain_busy": Out(1),
            "drain_row": In(range(2 * config.acc_rows)), "drain": Out(signed(ACC_BITS)).array(at_once(config)),
        } | ({"scale_turn": Out(range(config.passes)), "drain_turn": In(range(config.passes))}
             if config.passes > 1 else {}))

    def elaborate(self, platform):
        m = Module()
        config, times = self.config, _times(self.config)
        stepwise = _stepwise(config)
        pairs = [place(m, platform, f"pair{i}", lambda: ColumnPair(config=config), module="column_pair")
                 for i in range(at_once(config) // 2)]
        self._load(m, pairs)

        # The row and its control at each stage. Stages that wait for a row are skipped by a simulator.
        turn = Signal(range(config.passes))  # 0 but in further passes of a row
        enables = [self.row_en | turn.any()]
        with m.If(enables[0]):
            m.d.sync += turn.eq(turn + 1)
        for age in range(1, self.latency):
            enables.append(_delay(m, enables[-1], 1, f"row_en_{age}", reset_less=False))

        def at(value, cycles, name):
            for age in range(cycles):
                later = Signal.like(value, name=f"{name}_{age + 1}", reset_less=True)
                with m.If(1 if stepwise else enables[age]):
                    m.d.sync += later.eq(value)
                value = later
            return value

        control = at(self.control, times.added, "control")
        if config.passes > 1:
            m.d.comb += self.scale_turn.eq(at(turn, 1, "scale_turn"))
            acc_turn = at(turn, times.added, "acc_turn")
            done = control.last & acc_turn.all()
        else:
            done = control.last
        last = _delay(m, enables[times.added] & done, self.latency - times.added - config.passes + 1, "last",
                      reset_less=False)
        m.d.comb += [self.tile_done.eq(last), self.drain_busy.eq(
            enables[times.added] & ~control.first & (control.acc[-1] == self.drain_row[-1]))]
        mantissas = [at(value, times.row + skew(config.dsp, k), f"mantissa{k:02}")
                     for k, value in enumerate(self.row.mantissa)]
        blocks = []
        for b in range(config.blocks):
            gap, bias = Signal(signed(10), name=f"gap_wide{b}"), Signal(signed(BIAS_BITS), name=f"bias{b}")
            total = Signal(sum_shape(config), name=f"sum{b}")
            m.d.comb += [
                gap.eq(self.maximum - self.row.exponent[b]),
                bias.eq(Mux(self.control.signed_codes, -(self.row.sum[b] << CODE_BITS - 1), 0)),
                total.eq(Mux(self.control.minimum, self.row.sum[b], 0)),
            ]
            blocks.append((at(Mux(gap[6:].any(), 63, gap[:6]), 1, f"gap{b}"), at(bias, times.row, f"bias{b}"),
                           at(total, times.row + dot_latency(config.dsp), f"sum{b}")))
        for i, pair in enumerate(pairs):
            m.d.comb += [
                pair.acc_en.eq(enables[times.added]), pair.acc_row.eq(control.acc), pair.acc_first.eq(control.first),
                pair.drain_row.eq(self.drain_row), *(port.eq(value) for port, value in zip(pair.mantissa, mantissas)),
            ]
            if config.passes > 1:
                m.d.comb += [pair.turn.eq(turn), pair.acc_turn.eq(acc_turn), pair.drain_turn.eq(self.drain_turn)]
            for b, (gap, bias, total) in enumerate(blocks):
                m.d.comb += [pair.exponent_gap[b].eq(gap), pair.bias[b].eq(bias), pair.sum[b].eq(total)]
            for c in range(2):
                m.d.comb += self.drain[2 * i + c].eq(pair.drain[c])
                for b in range(config.blocks):
                    m.d.comb += [pair.scale[c][b].eq(self.scale[2 * i + c][b]),
                                 pair.minimum[c][b].eq(self.minimum[2 * i + c][b])]
            if not stepwise:
                m.d.comb += [pair.dot_en.eq(enables[0]), pair.scale_en.eq(enables[1]), pair.shift_en.eq(enables[2])]
        return m

    def _load(self, m, pairs):
        """Superbeats to where they wait for `swap`, and from there to the tile registers; each lane with its `skew`.

        A superbeat waits as it came: to a simulator that is a copy of a few long words. With a shared source it waits
        in blocks of E columns and E lanes, each filled by one step of keys and by one of values. If a step has two
        blocks of tokens, those of keys are neighbours in the columns and those of values in the lanes; neighbours both
        ways take different lines of words, so that either kind of step uses all lines.
        """
        config = self.config
        lanes, columns, step, elements = config.lanes, config.columns, config.kv_step, config.beat_elements
        shared, size = _shared_source(config), word_bits(config.dsp)
        # In lines that other tools can read: the codes of a column, the numbers of a token.
        codes = [self.codes.word_select(i, lanes * CODE_BITS) for i in range(columns // config.tile_beats)]
        numbers = [self.mantissas.word_select(i, elements * size) for i in range(step)]
        load_numbers = Signal((lanes // elements) * (columns // elements) if shared else len(self.load_keys))
        if shared:
            inner, outer, blocks = lanes // elements, columns // elements, step // elements
            keys, values, crosses = numbers, [], Signal()
            for at in range(0, step, elements):
                block = numbers[at:at + elements]
                values += [Cat(line.word_select(i, size) for line in block) for i in range(elements)]
            if blocks == 2:
                m.d.comb += crosses.eq(Cat(self.load_keys[1::2] if inner > 1 else (),
                                         self.load_values[1::2] if outer > 1 else ()).any())
            numbers = [Signal(len(line), name=f"numbers_{i}") for i, line in enumerate(keys)]
            for i, line in enumerate(numbers):
                other = (i + elements) % step
                m.d.comb += line.eq(Mux(self.load_values.any(), Mux(crosses, values[other], values[i]),
                                        Mux(crosses, keys[other], keys[i])))
            m.d.comb += load_numbers.eq(Cat(
                self.load_keys[q // blocks * inner + b] | self.load_values[b // blocks * outer + q]
                for q in range(outer) for b in range(inner)))
        else:
            m.d.comb += load_numbers.eq(self.load_keys | self.load_values)
        # What is loaded, and when it is in use.
        of_codes, of_values = Signal(name="of_codes"), Signal(name="of_values")
        with m.If(self.load_codes.any() | load_numbers.any()):
            m.d.sync += [of_codes.eq(self.load_codes.any()), of_values.eq(self.load_values.any())]
        now = [self.swap, self.swap & of_codes, self.swap & of_values]
        stages = [[codes, numbers, [self.load_codes], [load_numbers], now]]
        for age in range(1, _times(config).row + 1 + max(skew(config.dsp, k) for k in range(lanes))):
            stages.append([[_delay(m, line, 1, f"{name}{i}_{age}", reset_less=name in ("codes", "numbers"))
                            for i, line in enumerate(lines)] for lines, name in
                           zip(stages[-1], ("codes", "numbers", "load_codes", "load_numbers", "swap"))])
        waiting = {}

        def waits(age, kind, beat, line, word, size):
            """A word of a superbeat that was loaded."""
            lines, (load,) = stages[age][kind], stages[age][2 + kind]
            if (age, kind, beat, line) not in waiting:
                waiting[age, kind, beat, line] = held = Signal.like(
                    lines[line], name=f"waits_{age}_{kind}_{beat}_{line}", reset_less=True)
                with m.If(load[beat]):
                    m.d.sync += held.eq(lines[line])
            return waiting[age, kind, beat, line].word_select(word, size)

        per_beat = columns // config.tile_beats
        for n in range(columns):
            turn, column = divmod(n, at_once(config))
            pair, c = pairs[column // 2], 2 * turn + column % 2
            for k in range(lanes):
                age = _times(config).row + skew(config.dsp, k)
                in_use, code_in_use, value_in_use = stages[age][4]
                inner, outer, at = lanes // elements, columns // elements, k % elements
                if shared:
                    line = (n // elements + k // elements) % (step // elements) * elements + n % elements
                    key = waits(age, 1, n // elements * inner + k // elements, line, at, size)
                else:
                    key = waits(age, 1, n // step * inner + k // elements, n % step, at, size)
                m.d.comb += [
                    pair.load[c][k].eq(in_use), pair.load_code[c][k].eq(code_in_use),
                    pair.code[c][k].eq(waits(age, 0, n // per_beat, n % per_beat, k, CODE_BITS)),
                    pair.key[c][k].eq(key.as_signed()),
                ]
                if not shared:
                    value = waits(age, 1, k // step * outer + n // elements, k % step, n % elements, size)
                    m.d.comb += [pair.load_value[c][k].eq(value_in_use), pair.value[c][k].eq(value.as_signed())]

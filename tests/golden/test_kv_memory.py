"""KV records with reuse on the functional machine: places, pointers, short tiles, the history buffer, faults."""

import numpy as np
import pytest
from machine_bench import BEAT, CONFIG, HALT, KV, SIZE, TILE, Bench
from skipopu.golden.functional import MachineFault, ProgramError
from skipopu.golden.kv_memory import Tags
from skipopu.hw.isa import RowList, decode, encode
from skipopu.hw.registers import FaultCause
from test_attention import OUT, RECORD, SCORES, TOKENS, attention_bench, load_tile, tile_words

P, LAYERS = CONFIG.ports, 4
PLACES = 150
STORE = {"imm": KV, "record": RECORD, "places": PLACES, "reuse": 1, "x_reg": 1, "rows_reg": 2}
CORNERS = np.array([0, 0x7BFF, 0xFBFF, 1, 0x8001, 0x7C00, 0xFFFF, 0x3C00], np.uint16)


def load(first, layer, count=TILE, **fields):
    """LOADKV with reuse of ``count`` positions."""
    return encode("loadkv", **decode(load_tile(0))[1] | {"imm": KV, "x": first, "rows": count, "reuse": 1,
                                                         "layer": layer} | fields)


def members(mask):
    return [t for t in range(CONFIG.tokens) if mask >> t & 1]


class Story:
    """A machine, and what it should hold: records by (position, layer), places by port, in the words of the text."""

    def __init__(self, seed):
        self.bench, self.rng = Bench(), np.random.default_rng(seed)
        self.records, self.places = {}, {}
        self.used = [0] * P

    def store(self, layer, position, mask=15, rows=CONFIG.tokens):
        fresh = self.rng.integers(0, 1 << 16, (rows, RECORD * CONFIG.beat_elements)).astype(np.uint16)
        if position == layer == 0 and mask & 1:
            self.records, self.places, self.used = {}, {}, [0] * P
        for t in members(mask):
            q = position + t
            self.records[q, layer], self.places[q, layer] = fresh[t], self.used[q % P]
            self.used[q % P] += 1
        self.bench.machine.kvout[: rows * RECORD] = fresh.reshape(-1, CONFIG.beat_elements)
        self.bench.run(encode("route", rows=rows), encode("storekv", **STORE, layer=layer, list=RowList.MLP), HALT,
                       args=(position, rows), forced=[0, mask])

    def last(self, q, layer):
        return next(at for at in range(layer, -1, -1) if (q, at) in self.records)

    def tile(self, first, layer, count=TILE, **fields):
        """The tile that the machine loads."""
        self.bench.run(load(first, layer, count, **fields), HALT)
        (found,) = self.bench.machine._matrix.tiles
        self.bench.machine._matrix.forget_tiles()
        return found

    def check(self, first, layer, count=TILE, **fields):
        """Compare the tile with one of the records by the text, loaded plainly on another machine."""
        found, plain = self.tile(first, layer, count, **fields), Bench()
        for t in range(count):
            record = self.records[first + t, self.last(first + t, layer)].view(np.uint8)
            begin = (KV + t // P * RECORD) * BEAT
            plain.image[t % P, begin : begin + len(record)] = record
        plain.run(load_tile(0), HALT)
        (want,) = plain.machine._matrix.tiles
        for name in ("key", "value", "key_exponent", "value_exponent"):
            np.testing.assert_array_equal(getattr(found, name), getattr(want, name))


def filled(seed, positions=2 * TILE, rate=0.4):
    """A sequence whose layers behind the first are skipped at random."""
    story = Story(seed)
    for position in range(0, positions, CONFIG.tokens):
        story.store(0, position)
        for layer in range(1, LAYERS):
            if mask := sum(1 << t for t in range(CONFIG.tokens) if story.rng.random() >= rate):
                story.store(layer, position, mask)
    return story


# ---- places and pointers


@pytest.mark.parametrize("seed", [1, 2])
def test_every_record_needed_is_reached_whatever_was_skipped(seed):
    story = filled(seed)
    for layer in range(LAYERS):
        for first, count in ((0, TILE), (TILE, TILE), (TILE, 1), (P, TILE), (2, TILE - 3), (0, 2)):
            story.check(first, layer, count)
    assert story.bench.machine.counters["kv_read"] == 2 * RECORD * BEAT


def test_storage_is_used_for_executed_tokens_only_each_record_whole_behind_its_port():
    story = filled(3)
    machine = story.bench.machine
    assert machine.kv.following.tolist() == story.used
    assert sum(story.used) == len(story.records) < 2 * TILE * LAYERS
    for (q, layer), record in story.records.items():
        begin = (KV + story.places[q, layer] * RECORD) * BEAT
        np.testing.assert_array_equal(story.bench.image[q % P, begin : begin + RECORD * BEAT].view(np.uint16), record)
    last = KV + max(story.used) * RECORD
    assert not story.bench.image[:, last * BEAT :].any()


def test_a_sequence_begins_anew_at_position_0_of_layer_0():
    story = filled(4)
    story.store(0, 0)
    story.store(2, 0, 0b0110)
    assert story.bench.machine.kv.following.tolist() == story.used == [3, 3]
    for layer in range(LAYERS):
        story.check(0, layer, CONFIG.tokens)
    with pytest.raises(MachineFault, match="KV_POINTER.* position 4 in layer 0 names no record") as info:
        story.tile(0, 0, CONFIG.tokens + 1)
    assert info.value.port == 4 % P


def test_a_position_written_again_takes_a_new_place():
    story = filled(5)
    before = list(story.used)
    story.store(0, TILE)  # its later layers are forgotten with it
    assert story.used == [n + CONFIG.tokens // P for n in before]
    story.records = {key: value for key, value in story.records.items()
                     if key[1] == 0 or not TILE <= key[0] < TILE + CONFIG.tokens}
    for layer in range(LAYERS):
        story.check(TILE, layer)


def test_tiles_are_kept_until_one_of_their_records_may_have_changed():
    story = filled(6, TILE, rate=0.0)
    found = story.tile(0, 2)
    assert story.tile(0, 2) is found and story.tile(0, 2, TILE - 1) is not found
    story.store(1, TILE)  # a new place
    assert story.tile(0, 2) is found
    story.bench.machine.invalidate((KV + 5 * RECORD) * BEAT, BEAT)  # layer 2 of the first chunk
    assert story.tile(0, 2) is not found


# ---- short tiles


@pytest.mark.parametrize("count, rows", [(1, 1), (P, 1), (P + 1, 2), (TILE - 1, TILE // P), (TILE, TILE // P),
                                         (TILE + 1, TILE // P), (4095, TILE // P)])
def test_a_plain_tile_reads_the_rows_that_exist(count, rows):
    machine = Bench().run(encode("loadkv", **decode(load_tile(0))[1] | {"rows": count}), HALT)
    assert machine.counters["kv_read"] == rows * P * RECORD * BEAT


@pytest.mark.parametrize("count", [1, 5, TILE - 1])
def test_what_lies_behind_the_last_position_cannot_leak(count):
    """Scores that are masked and probabilities of 0 hide any record, of the largest exponents and of none."""
    found = []
    for seed in (None, 7, 8):
        bench, _, _, _ = attention_bench(30)
        words = [encode("vinit"), load_tile(0), *tile_words(count - TOKENS)]
        bench.run(encode("vinit"), load_tile(0), HALT)
        (tile,) = bench.machine._matrix.tiles
        bench.machine._matrix.forget_tiles()
        beyond = {}
        for name in ("key", "value", "key_exponent", "value_exponent"):
            part = beyond[name] = getattr(tile, name).copy()
            tokens = part.swapaxes(-1, -2).reshape(2, TILE, -1)[:, count:] if name == "value" else part[..., count:]
            size = 31 if "exponent" in name else 4095
            noise = 0 if seed is None else np.random.default_rng(seed).integers(0, size + 1, tokens.shape)
            if name == "value":
                part.reshape(2, TILE, -1)[:, count:] = np.reshape(noise, -1)[0] if seed is None else noise
            else:
                part[..., count:] = noise
        bench.machine._matrix.tiles.append(type(tile)(**beyond))
        machine = bench.run(words[0], *words[2:], HALT)
        found.append([machine.abuf[OUT : OUT + 48].copy(), machine.maximum.copy(), machine.total.copy(),
                      machine.abuf[SCORES : SCORES + 48].copy()])
    for other in found[1:]:
        for got, want in zip(other, found[0]):
            np.testing.assert_array_equal(got, want)


# ---- the history buffer


class BufferByText:
    """The policy for one port, in the words of docs/kv-memory.md."""

    def __init__(self, slots):
        self.slots, self.kept, self.stack, self.fresh = slots, {}, [], 0

    def visit(self, row, place, keep, beyond):
        free = self.slots - self.fresh + len(self.stack)
        plenty = free >= self.slots // 4
        if row in self.kept and self.kept[row][0] == place:
            if not keep:
                self.stack.append(self.kept.pop(row)[1])
            return True
        if keep and (plenty or beyond) and (row in self.kept or free):
            if row in self.kept:
                slot = self.kept[row][1]
            elif self.stack:
                slot = self.stack.pop()
            else:
                slot, self.fresh = self.fresh, self.fresh + 1
            self.kept[row] = place, slot
        elif row in self.kept:
            self.stack.append(self.kept.pop(row)[1])
        return False


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16])
def test_tags_follow_the_policy(slots):
    rows, ports, rng = 16, 4, np.random.default_rng(slots)
    tags, text = Tags(rows, ports), [BufferByText(slots) for _ in range(ports)]
    hits = 0
    for visit in range(1500):
        if visit == 700:
            tags.clear()
            text = [BufferByText(slots) for _ in range(ports)]
        row = int(rng.integers(rows))
        place = np.where(rng.random(ports) < 0.9, row * 3 + rng.integers(0, 2, ports), -1)
        keep, beyond = rng.random((2, ports)) < [[0.7], [0.4]]
        want = [bool(place[p] >= 0 and text[p].visit(row, place[p], keep[p], beyond[p])) for p in range(ports)]
        assert tags.visit(row, place, keep, beyond, slots)[0].tolist() == want, visit
        hits += sum(want)
        for p in range(ports):
            assert {r: (tags.place[r, p], tags.slot[r, p]) for r in np.flatnonzero(tags.valid[:, p])} == text[p].kept
            assert (tags.fresh[p], tags.stack[p, : tags.depth[p]].tolist()) == (text[p].fresh, text[p].stack)
            slots_used = [slot for _, slot in text[p].kept.values()]
            assert len(set(slots_used)) == len(slots_used) and all(slot < slots for slot in slots_used)
    assert hits > 100


@pytest.mark.parametrize("buffer", [0, 1, 5, 16])
def test_the_buffer_changes_what_is_read_but_no_tile(buffer):
    """Layers one after another, twice over; what the buffer brings are the records of the policy."""
    story = filled(9, rate=0.6)
    text = [BufferByText(buffer) for _ in range(P)]
    total = 0
    for layer in [*range(LAYERS), *range(LAYERS)]:
        for first, count in ((0, TILE), (TILE, TILE - 1)):
            held = 0
            story.check(first, layer, count, buffer=buffer, final=int(layer == LAYERS - 1))
            for q in range(first, first + count):
                at = story.last(q, layer)
                keep = buffer and layer < LAYERS - 1 and (q, layer + 1) not in story.records
                beyond = (q, layer + 2) not in story.records
                got = bool(buffer) and text[q % P].visit(q // P, story.places[q, at], keep, beyond)
                held += got
            counters = story.bench.machine.counters
            assert counters["kv_buffered"] == held * RECORD * BEAT
            assert counters["kv_read"] + counters["kv_buffered"] == count * RECORD * BEAT
            total += held
    assert (total > 0) == (buffer > 0)


def test_the_buffer_is_emptied_by_another_setting_a_new_sequence_and_reset():
    story = filled(10, TILE, rate=1.0)  # every layer uses the records of layer 0

    def buffered(layer=1, **fields):
        story.tile(0, layer, **{"buffer": TILE // P} | fields)
        return story.bench.machine.counters["kv_buffered"] // (RECORD * BEAT)

    assert [buffered(), buffered()] == [0, TILE]
    assert [buffered(buffer=4), buffered(buffer=4)] == [0, 8]  # 4 of each port
    assert [buffered(record=RECORD + 1, buffer=4), buffered(buffer=4), buffered(buffer=4)] == [0, 0, 8]
    assert [buffered(buffer=0), buffered(), buffered()] == [0, 0, TILE]
    assert [buffered(final=1), buffered()] == [TILE, 0]
    for position in range(0, TILE, CONFIG.tokens):
        story.store(0, position)
    assert buffered() == 0
    story.bench.machine.reset()
    for position in range(0, TILE, CONFIG.tokens):
        story.store(0, position)
    assert buffered() == 0


# ---- faults and undefined programs


@pytest.mark.parametrize("damage, port", [
    ("places[2, 1, 1] = 9999", 1), ("places[2, 0, 1] = kv.following[0]", 0), ("written[2, 1] = False", 1),
    ("written[1:3] = False", 0), ("begun = False", 0)])
def test_a_damaged_pointer_is_a_fault_and_nothing_is_read(damage, port):
    story = filled(11, TILE, rate=0.0)
    exec(f"kv.{damage}", {"kv": story.bench.machine.kv})
    with pytest.raises(MachineFault, match="KV_POINTER") as info:
        story.tile(0, 1)
    assert (info.value.cause, info.value.port) == (FaultCause.KV_POINTER, port)
    assert not story.bench.machine._matrix.tiles and story.bench.machine.counters["kv_read"] == 0


def test_no_pointer_outlasts_a_reset():
    story = filled(12, TILE)
    story.bench.machine.reset()
    with pytest.raises(MachineFault, match="KV_POINTER"):
        story.tile(0, 0)
    with pytest.raises(MachineFault, match=f"KV_POINTER.* position {TILE} is stored, but no sequence begun"):
        story.store(0, TILE)
    story.store(0, 0)
    story.check(0, 3, CONFIG.tokens)


def test_memory_that_is_full_names_the_port():
    story = Story(13)
    story.store(0, 0)
    with pytest.raises(MachineFault, match="KV_FULL.* all 3 places of the port hold records") as info:
        story.bench.run(encode("storekv", **STORE | {"places": 3}, layer=1), HALT, args=(1, 3))
    assert info.value.port == 1  # positions 1, 2, 3: port 0 has room for one more
    assert story.bench.machine.kv.following.tolist() == [3, 3]


@pytest.mark.parametrize("word, cause, port, message", [
    (load(CONFIG.history_tokens - TILE + 2, 0), FaultCause.BUFFER_RANGE, 0, r"positions \d+..257"),
    (load(0, 0, buffer=CONFIG.buffer_beats // RECORD + 1), FaultCause.BUFFER_RANGE, 0,
     "records of 16 beats; the history buffer has 256 beats"),
    (load(0, 0, imm=SIZE - 2 * RECORD + 1), FaultCause.MEMORY_RANGE, 0, "memory has 8192"),
    (load(0, 0, imm=-RECORD), FaultCause.MEMORY_RANGE, 0, "memory has 8192"),
    (encode("storekv", **STORE | {"x_reg": 0, "rows": 1, "x": CONFIG.history_tokens}), FaultCause.BUFFER_RANGE, 0,
     "layer 0 of position 256: 64 layers of 256 positions have pointers"),
    (encode("storekv", **STORE | {"rows": 3, "imm": SIZE - RECORD}), FaultCause.MEMORY_RANGE, 0, "memory has"),
    (encode("storekv", **STORE | {"rows": 3, "record": 400}), FaultCause.BUFFER_RANGE, 0, "kvout row 1199 of 1024"),
])
def test_faults(word, cause, port, message):
    story = Story(14)
    story.store(0, 0)
    with pytest.raises(MachineFault, match=message) as info:
        story.bench.run(word, HALT)
    assert (info.value.cause, info.value.port) == (cause, port)


@pytest.mark.parametrize("word, message", [
    (load(-2, 0), "position must be a multiple of 2 ports, not -2"),
    (load(3, 0), "position must be a multiple of 2 ports, not 3"),
    (load(0, 0, count=0), "loadkv: rows must be at least 1"),
    (encode("storekv", **STORE | {"rows": 1, "x": -1}), "position must not be negative, but is -1"),
])
def test_undefined_programs_are_refused(word, message):
    with pytest.raises(ProgramError, match=message):
        Bench().run(word, HALT)

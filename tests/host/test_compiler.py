"""Compiled programs, run in plain floats, against the float reference; what fits; the rules of a program."""

import dataclasses

import numpy as np
import pytest
from float_machine import FloatDevice
from skipopu.golden.random_model import random_model
from skipopu.golden.reference import ReferenceModel
from skipopu.golden.routed import RandomRoutes, RoutedReference
from skipopu.host.compiler import compile_model
from skipopu.host.errors import CapacityError, CompileError, RouterError
from skipopu.host.model import QuantTensor
from skipopu.host.passes.check import CheckError, check_program, corner_arguments
from skipopu.host.passes.routers import router_biases, router_rows
from skipopu.host.passes.walk import Arguments, walk
from skipopu.host.passes.weights import Padding, lower_linear, same_kind
from skipopu.host.plan import KV_FORMATS, KvSizes, make_plan
from skipopu.host.program import Program
from skipopu.host.quantise import quantise
from skipopu.host.routers import Routers
from skipopu.host.routes import always_executing
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import PRESETS, preset
from skipopu.hw.isa import OPCODES, MatmulMode, RowList, assemble, decode, encode

# root mean square of the error, in units of that of the logits
# FP16 records of keys and values (up to 2^-12) are all the rounding of the float machine
FP16_BOUND = 0.004
# weights quantised to q8_0 on the way: each changes by up to 1/254 of the largest of its 32, through all layers
REQUANTISED_BOUND = 0.15
Q8 = ("q8_0",)

GEOMETRIES = [  # kinds, bound, geometry
    ("plain", ("q4_1",), FP16_BOUND, {}),
    ("q4_0 with an own head", ("q4_0",), FP16_BOUND, {"tied_head": False, "vocab": 130}),
    ("one head, one layer", Q8, FP16_BOUND, {"heads": 1, "kv_heads": 1, "layers": 1, "head_dim": 32}),
    ("odd vocabulary and groups", Q8, FP16_BOUND, {"heads": 6, "kv_heads": 2, "vocab": 101, "head_dim": 16}),
    ("one KV head for seven", Q8, FP16_BOUND, {"heads": 7, "kv_heads": 1, "head_dim": 32}),
    ("small heads", Q8, FP16_BOUND, {"heads": 4, "kv_heads": 4, "head_dim": 8}),
    ("heads of 128", Q8, FP16_BOUND, {"heads": 2, "kv_heads": 1, "head_dim": 128}),
    ("hidden and MLP that fill no lanes", Q8, FP16_BOUND, {"hidden": 96, "mlp": 160}),
    ("float tensors and odd sizes", ("f16", "f32"), REQUANTISED_BOUND,
     {"hidden": 70, "mlp": 90, "head_dim": 10, "heads": 3, "kv_heads": 3}),
    ("groups across padded heads", ("q4_1",), REQUANTISED_BOUND, {"heads": 2, "kv_heads": 2, "head_dim": 80}),
    ("mixed kinds", ("q4_0", "q4_1", "q8_0", "f16"), REQUANTISED_BOUND, {"layers": 3}),
]


ROOMY = {name: config for name, config in PRESETS.items() if name != "ulx3s"}  # the board holds small models only


def loaded(config, model, **options):
    compiled = compile_model(model, config, **options)
    return Accelerator(FloatDevice(config, compiled.map.memory * config.port_bits // 8), compiled)


@pytest.mark.parametrize("config", ROOMY.values(), ids=list(ROOMY))
@pytest.mark.parametrize(("kinds", "bound", "geometry"), [case[1:] for case in GEOMETRIES],
                         ids=[case[0] for case in GEOMETRIES])
def test_logits_agree_with_the_reference(config, kinds, bound, geometry):
    model = random_model(5, kinds=kinds, **geometry)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, config.tile_tokens // 2 + 21).tolist()
    got = np.concatenate(list(loaded(config, model).evaluate(tokens)))
    want = ReferenceModel(model).forward(tokens).numpy()
    assert got.shape == want.shape
    error = np.sqrt(np.square(got - want).mean(axis=1) / np.square(want).mean())
    assert error.max() < bound, f"row {error.argmax()} of {len(error)}"


def test_chunks_of_any_length_give_the_same_logits():
    model, config = random_model(6, kinds=Q8), preset("tiny")
    tokens = np.random.default_rng(1).integers(0, 96, 23).tolist()
    whole = np.concatenate(list(loaded(config, model).evaluate(tokens)))
    rows = []
    accelerator = loaded(config, model)
    for token in tokens:
        assert accelerator.step(token) == int(accelerator.logits()[0].argmax())
        rows.append(accelerator.logits()[0])
    np.testing.assert_allclose(rows, whole, atol=1e-4)  # numpy adds up batches of other sizes in another order


def test_head_runs_for_the_rows_asked_for():
    model, config = random_model(7, kinds=Q8), preset("tiny")
    every, last = loaded(config, model), loaded(config, model)
    every.run([1, 2, 3], 0, 3)
    last.run([1, 2, 3], 1, 2)
    np.testing.assert_allclose(last.logits(), every.logits()[1:], atol=1e-4)
    none = loaded(config, model)
    none.run([1, 2, 3])
    with pytest.raises(ValueError, match="no logits"):
        none.logits()
    assert none.stats[-1].counters["instructions"] < every.stats[-1].counters["instructions"]


def test_same_model_gives_the_same_program_and_image():
    first, second = (compile_model(random_model(3), preset("sim")) for _ in range(2))
    assert first.program.words == second.program.words
    np.testing.assert_array_equal(first.image, second.image)


# routers

@pytest.mark.parametrize("config", ROOMY.values(), ids=list(ROOMY))
@pytest.mark.parametrize("kv", ["dense", "reuse"])
def test_routed_logits_agree_with_the_routed_reference(config, kv):
    model = random_model(2, kinds=Q8, layers=4, hidden=96, heads=6, kv_heads=2)
    routers = always_executing(model, kv)
    tokens = np.random.default_rng(0).integers(0, 96, config.tile_tokens // 2 + 21).tolist()
    force = RandomRoutes(0.4, 1)
    compiled = compile_model(model, config, routers=routers)
    accelerator = Accelerator(FloatDevice(config, compiled.map.memory * config.port_bits // 8), compiled, force=force)
    got = np.concatenate(list(accelerator.evaluate(tokens)))
    reference = RoutedReference(model, routers, force=force)
    want = reference.forward(tokens).numpy()
    np.testing.assert_array_equal(accelerator.decisions, reference.decisions)
    error = np.sqrt(np.square(got - want).mean(axis=1) / np.square(want).mean())
    assert error.max() < FP16_BOUND, f"row {error.argmax()} of {len(error)}"


def test_router_tables_hold_both_modules_in_fp16():
    routers = make_routers(random_model(3))
    routers.difference[0, :, :4] = [[1, -2, 0.1, 2.0**-15], [0.5, 65504, -(2.0**-14), 1e-8]]
    rows = router_rows(routers, 96)
    assert rows.shape == (2, 96) and rows.dtype == np.uint32 and not rows[:, 64:].any()
    halves = rows.view(np.float16).reshape(2, 96, 2)
    np.testing.assert_array_equal(halves[0, :4, 0], np.float16([1, -2, 0.1, 0]))  # subnormal numbers become 0
    np.testing.assert_array_equal(halves[0, :4, 1], np.float16([0.5, 65504, -(2.0**-14), 0]))
    routers.bias[:] = [[1, -0.5], [127.99999, 2.0**-25]]
    assert router_biases(routers).tolist() == [[1 << 24, -(1 << 23)], [2147483520, 0]]


def make_routers(model, kv="dense", **changed):
    rng, shape = np.random.default_rng(0), (model.config.layers, 2, model.config.hidden)
    parts = {"difference": rng.standard_normal(shape).astype(np.float32), "bias": np.zeros(shape[:2], np.float32)}
    return Routers(kv=kv, base=model.identity, **parts | changed)


@pytest.mark.parametrize(("changed", "message"), [
    ({"bias": np.full((2, 2), -128, np.float32)}, "bias of layer 0 attention must be below 128 in magnitude, not -128"),
    ({"difference": np.full((2, 2, 64), 7e4, np.float32)}, "must be within the FP16 numbers, up to 65504, not 70000"),
    ({"difference": np.ones((2, 2, 8), np.float32), "hidden_weight": np.ones((2, 2, 8, 64), np.float32),
      "hidden_bias": np.ones((2, 2, 8), np.float32)}, "two-layer routers .* run in the reference only"),
    ({"difference": np.ones((2, 2, 32), np.float32)}, "with width 32, but random-3 has 64"),
    ({"lora": {"o": np.zeros((2, 64, 2), np.float16)}}, "merge them first"),
])
def test_routers_that_the_overlay_cannot_run(changed, message):
    model = random_model(3)
    with pytest.raises(RouterError, match=message):
        compile_model(model, preset("tiny"), routers=make_routers(model, **changed))


@pytest.mark.parametrize(("geometry", "kv", "context", "limit"), [
    ({"hidden": 1024, "layers": 1, "vocab": 8}, "dense", 16, "router_rows .* must be at least 512 but is 256"),
    ({"layers": 65, "hidden": 32, "mlp": 32, "head_dim": 8}, "dense", 16, "layers of a routed model must be .* 65"),
    ({"context": 512}, "reuse", 512, "history_tokens .* must be at least 512 but is 256; use .* sim or sim16 or u280"),
    ({"layers": 65, "hidden": 32, "mlp": 32, "head_dim": 8}, "reuse", 16, "layers of a routed model must be .* 65"),
])
def test_capacity_of_routed_programs(geometry, kv, context, limit):
    model = random_model(1, kinds=Q8, **geometry)
    with pytest.raises(CapacityError, match=limit):
        compile_model(model, preset("tiny"), context, make_routers(model, kv))


def test_reuse_provides_by_default_for_what_the_history_holds():
    model = random_model(1, kinds=Q8, context=512)
    plans = {kv: make_plan(preset("tiny"), model.config, kv=kv).context for kv in ("", "dense", "reuse")}
    assert plans == {"": 512, "dense": 512, "reuse": 256}


def test_memory_and_buffer_of_kv_records_are_sized_for_the_model_or_as_asked():
    model, config = random_model(1, kinds=Q8, context=101), preset("tiny")  # records of 16 beats behind each of 2 ports
    plans = {key: make_plan(config, model.config, 101, kv, sizes) for key, kv, sizes in (
        ("none", "reuse", KvSizes(buffer=0)), ("all", "reuse", None), ("less", "reuse", KvSizes(0.61, 2 * 8 * 40)),
        ("least", "reuse", KvSizes(0.0)), ("dense", "dense", KvSizes(0.5, buffer=100)))}
    assert {key: (plan.record, plan.places, plan.buffer) for key, plan in plans.items()} == {
        "none": (16, 51 * 2, 0), "all": (16, 51 * 2, 16), "less": (16, 63, 2), "least": (16, 51, 16),
        "dense": (16, 0, 0)}
    compiled = compile_model(model, config, 101, make_routers(model, "reuse"), kv=KvSizes(0.61, 2 * 8 * 40))
    assert compiled.map.regions["kv"][1] == 63 * 16 and (compiled.map.places, compiled.map.buffer) == (63, 2)
    assert compiled.summary()["bytes"]["kv"] == 63 * 16 * config.superbeat_bytes


@pytest.mark.parametrize(("sizes", "message"), [
    ({"buffer": 4097}, "the history buffer of configuration tiny has 4096 bytes; ask for 0..4096, not 4097"),
    ({"buffer": -1}, "has 4096 bytes; ask for 0..4096, not -1"),
    ({"share": 1.5}, "the share of KV records that memory holds must be 0..1, not 1.5"),
    ({"share": -0.1}, "must be 0..1, not -0.1"),
    ({"format": "int8"}, "KV format must be fp16, 12, 8, not 'int8'"),
])
def test_impossible_sizes_of_kv_memory(sizes, message):
    with pytest.raises(CompileError, match=message):
        make_plan(preset("tiny"), random_model(1).config, kv="reuse", sizes=KvSizes(**sizes))


def test_narrow_kv_records_take_less_memory_and_more_fit_the_buffer():
    model, config = random_model(1, kinds=Q8, context=101), preset("tiny")
    plans = {name: make_plan(config, model.config, 101, "reuse", KvSizes(format=name)) for name in KV_FORMATS}
    assert {name: (plan.record, plan.kvout_record, plan.buffer) for name, plan in plans.items()} == {
        "fp16": (16, 16, 16), "12": (1 + 8 + 4, 16, 19), "8": (1 + 8, 16, 28)}
    for kv in ("", "dense", "reuse"):  # the checker walks the programs
        compiled = compile_model(model, config, 101, make_routers(model, kv) if kv else None, kv=KvSizes(format="12"))
        assert compiled.map.kv_format == "12"


def test_more_layers_than_pointers_have():
    model = random_model(1, kinds=Q8, layers=17, hidden=32, heads=2, kv_heads=1, head_dim=16, mlp=32, context=16)
    with pytest.raises(CapacityError, match="history_layers .* must be at least 17 but is 16; use .* tiny or sim"):
        make_plan(preset("ulx3s"), model.config, 16, "reuse")


def test_more_records_than_pointers_can_name():
    model = random_model(1, kinds=Q8, layers=64, hidden=32, mlp=32, head_dim=8, context=8192)
    with pytest.raises(CapacityError, match=r"storekv.places .* must be at least 65536 but is 65535"):
        make_plan(preset("sim"), model.config, 8192, "reuse")
    assert make_plan(preset("sim"), model.config, 8192, "reuse", KvSizes(share=0.8)).places == 52429


# what fits

@pytest.mark.parametrize(("geometry", "limit", "advice"), [
    ({"heads": 44, "kv_heads": 44, "head_dim": 8}, "state_rows", "no preset"),
    ({"heads": 24, "kv_heads": 1, "head_dim": 8}, "acc_rows", "use configuration sim or sim16 or u280"),
    ({"hidden": 16384, "layers": 1, "vocab": 8}, "abuf_rows", "u280"),
    ({"heads": 32, "kv_heads": 32, "head_dim": 64}, "kvbuf_heads", "u280"),
])
def test_capacity_error_names_the_limit_and_a_preset(geometry, limit, advice):
    model = random_model(1, kinds=Q8, **geometry)
    with pytest.raises(CapacityError, match=f"does not fit configuration tiny: {limit}.*must be at least .*{advice}"):
        compile_model(model, preset("tiny"))


def test_chunk_shrinks_to_what_the_buffers_hold():
    config = preset("sim")
    assert make_plan(config, random_model(1).config).chunk == config.tokens
    groups = dataclasses.replace(random_model(1).config, heads=10, kv_heads=1)
    assert make_plan(config, groups).chunk == config.acc_rows // 10


@pytest.mark.parametrize("context", [0, 129])
def test_context_beyond_the_model_is_refused(context):
    with pytest.raises(CompileError, match=r"context must be 1\.\.128"):
        compile_model(random_model(1), preset("tiny"), context=context)


@pytest.mark.parametrize("context", [1, 5, 128])
def test_context_is_what_was_asked_for(context):
    compiled = compile_model(random_model(1), preset("tiny"), context=context)
    assert compiled.map.context == context
    assert compiled.map.chunk == 4


# weights

def test_kinds_that_share_a_matmul_keep_their_values():
    rng = np.random.default_rng(4)
    tensors = {kind: quantise(rng.standard_normal((4, 64), np.float32), kind) for kind in ("q4_0", "q4_1", "q8_0")}
    notes = []
    for other in ("q4_1", "q8_0"):
        pair = same_kind(tensors["q4_0"], tensors[other], "x", notes)
        assert pair[0].kind == pair[1].kind == other and not notes
        np.testing.assert_array_equal(pair[0].dequantise(), tensors["q4_0"].dequantise())
    pair = same_kind(tensors["q4_1"], tensors["q8_0"], "x", notes)
    assert [item.kind for item in pair] == ["q8_0", "q8_0"] and "q4_1 quantised to q8_0" in notes[0]


def test_q4_0_scale_too_large_for_a_minimum_becomes_q8_0():
    codes = np.ones((1, 32), np.int8)
    large = QuantTensor("q4_0", codes=codes, scale=np.float16([[9000]]))
    other = QuantTensor("q4_1", codes=codes, scale=np.float16([[1]]), minimum=np.float16([[2]]))
    notes = []
    pair = same_kind(large, other, "x", notes)
    assert [item.kind for item in pair] == ["q8_0", "q8_0"] and len(notes) == 1
    np.testing.assert_array_equal(pair[0].dequantise(), large.dequantise())


@pytest.mark.parametrize(("size", "padded", "exact"), [(64, 64, True), (96, 128, True), (80, 128, False)])
def test_padded_heads_keep_block_scales_where_groups_allow(size, padded, exact):
    tensor = quantise(np.random.default_rng(5).standard_normal((3, 2 * size), np.float32), "q4_0")
    notes = []
    linear = lower_linear(preset("u280"), "o", tensor, Padding(1, 3, 3), Padding(2, size, padded), notes)
    value = linear.codes * np.repeat(linear.scale.astype(np.float32), 32, axis=1)
    value = value.reshape(3, 2, padded)
    assert (linear.mode == MatmulMode.W4) == exact == (not notes)
    assert not value[..., size:].any()
    np.testing.assert_allclose(value[..., :size].reshape(3, -1), tensor.dequantise(), atol=0 if exact else 0.02)


# the checker

@pytest.fixture(scope="module")
def small():
    model, config = random_model(3, kinds=("q4_1",)), preset("tiny")
    return compile_model(model, config), make_plan(config, model.config)


def find(program, mnemonic, number=0):
    return [pc for pc, word in enumerate(program.words) if decode(word)[0].mnemonic == mnemonic][number]


def changed(program, pc, **fields):
    words = list(program.words)
    item, values = decode(words[pc])
    words[pc] = encode(item.mnemonic, **values | fields)
    return Program(words, program.notes)


MUTATIONS = [
    ("loadw", {"count": 1}, "consumes"),
    ("loadw", {"imm": 0}, "not in a region"),
    ("loada", {"writes": 0}, "writes must be"),
    ("loada", {"x": 4095}, "not inside one region"),
    ("loada", {"beats": 1}, "read before"),
    ("matmul", {"reads": 0}, "reads must be"),
    ("matmul", {"x": 2000}, "one region"),
    ("matmul", {"beats": 1}, "delivers|beats must end"),
    ("matmul", {"rows": 1}, "one region|read before"),
    ("matmul", {"k_tiles": 1}, "consumes"),
    ("vrope", {"beats": 4}, "delivers"),
    ("vrope", {"writes": 0}, "writes must be"),
    ("vrope", {"table": 0}, "read before|one region|reads must be"),
    ("vadd", {"imm": 1}, "one region|read before"),
    ("vadd", {"vector": 3}, "aligned vectors"),
    ("vnorm", {"heads": 2}, "heads and groups must be 1"),
    ("vadd", {"groups": 2}, "heads and groups must be 1|delivers"),
    ("vscore", {"writes": 0}, "writes must be"),
    ("vprob", {"reads": 0}, "reads must be"),
    ("vmerge", {"head_stride": 0, "group_stride": 0}, "read before|one region|writes must be"),
    ("vswiglu", {"rows": 1}, "delivers"),
    ("vlogits", {"imm": 0}, "logits that count"),
    ("loadkv", {"record": 1}, "record must be"), ("loadkv", {"format": 1}, "format must be FP16, not 1"),
    ("storekv", {"record": 17}, "record must be 16, not 17"), ("storekv", {"format": 2}, "format must be FP16, not 2"),
    ("loadkv", {"imm": 100000}, "not in a region"), ("loadkv", {"reads": 0}, "reads must be"),
    ("storekv", {"reads": 0}, "reads must be"),
    ("storekv", {"imm": 0}, "not in a region"),
    ("storel", {"count": 1}, "VLOGITS sends"),
]


@pytest.mark.parametrize(("mnemonic", "fields", "message"), MUTATIONS, ids=lambda value: str(value))
def test_checker_finds_a_wrong_field(small, mnemonic, fields, message):
    compiled, plan = small
    program = changed(compiled.program, find(compiled.program, mnemonic), **fields)
    with pytest.raises(CheckError, match=message):
        check_program(program, plan, compiled.map.regions)


def moved(program, pc, to):
    """The program with one instruction moved to another place, branches following theirs."""
    words, places = list(program.words), list(range(len(program.words) + 1))
    words.insert(to, words.pop(pc))
    places.insert(to, places.pop(pc))
    for at, word in enumerate(words):
        item, fields = decode(word)
        if item.mnemonic == "branch":
            words[at] = encode("branch", **fields | {"imm": places.index(fields["imm"])})
    return Program(words, program.notes)


def test_checker_finds_a_load_that_weights_block(small):
    compiled, plan = small
    program = compiled.program
    gain, weights = find(program, "loada", 2), find(program, "loadw")
    assert gain < find(program, "vnorm") < weights  # the norm feeds the matmul of these weights
    with pytest.raises(CheckError, match="waits for a load that stands behind its weights"):
        check_program(moved(program, weights, gain), plan, compiled.map.regions)
    gain, product = find(program, "loada", 3), find(program, "matmul", 5)
    assert gain < product < find(program, "vadd")  # the gain of the add behind the matmul
    with pytest.raises(CheckError, match="behind the weights of the matmul whose results it takes"):
        check_program(moved(program, gain, product), plan, compiled.map.regions)


@pytest.fixture(scope="module", params=["dense", "reuse"])
def routed(request):
    model, config = random_model(3, kinds=("q4_1",)), preset("tiny")
    return (compile_model(model, config, routers=make_routers(model, request.param)),
            make_plan(config, model.config, kv=request.param))


def last(program, mnemonic):
    return max(pc for pc, word in enumerate(program.words) if decode(word)[0].mnemonic == mnemonic)


ROUTED_MUTATIONS = [  # instruction, its number or -1 for the last, changed fields, message
    ("storekv", 1, {"list": RowList.MLP}, "kvout is read before|nobody stores"),
    ("matmul", 2, {"list": RowList.MLP}, "delivers|consumes|nobody takes"),
    ("vnorm", 0, {"route": 0}, r"rows \[0.*\] are not scored"),
    ("vnorm", 2, {"list": RowList.MLP_ONLY}, "are not scored"),
    ("vnorm", 2, {"x": 200}, "routers is read before|one region"),
    ("vadd", 1, {"list": RowList.ALL}, "delivers"),
    ("vadd", 0, {"list": RowList.MLP}, "delivers"),
    ("loadw", -1, {"list": RowList.MLP}, "consumes"),
    ("branch", -1, {"list": RowList.NO_MLP}, "consumes|VLOGITS|takes rows|rows must be"),
    ("loada", 3, {"x": -1}, "one region"),
    ("storel", 0, {"list": RowList.ATTENTION}, "nobody takes"),
    ("loadkv", 1, {"reads": 1}, "reads must be"),  # a tile of records before the run's
]


@pytest.mark.parametrize(("mnemonic", "number", "fields", "message"), ROUTED_MUTATIONS, ids=lambda value: str(value))
def test_checker_walks_the_corners_of_routes(routed, mnemonic, number, fields, message):
    compiled, plan = routed
    pc = last(compiled.program, mnemonic) if number < 0 else find(compiled.program, mnemonic, number)
    with pytest.raises(CheckError, match=message):
        check_program(changed(compiled.program, pc, **fields), plan, compiled.map.regions)


@pytest.mark.parametrize(("mnemonic", "fields", "message"), [
    ("loadkv", {"imm": 0}, "not in a region of kv"), ("loadkv", {"rows_reg": 0}, "rows must be at least 1"),
    ("loadkv", {"x": 3}, "from a multiple of 2"), ("loadkv", {"x": 1000}, "not all among the 256 that have pointers"),
    ("loadkv", {"buffer": 17}, "the history buffer has 256 beats, not 17 records of 16"),
    ("storekv", {"places": 2000}, "not in a region of kv"), ("storekv", {"x": 1000}, "position 10.. .*has no pointer"),
])
def test_checker_follows_kv_records_with_reuse(mnemonic, fields, message):
    model, config = random_model(3, kinds=("q4_1",)), preset("tiny")
    compiled = compile_model(model, config, routers=make_routers(model, "reuse"))
    plan = make_plan(config, model.config, kv="reuse")
    program = changed(compiled.program, find(compiled.program, mnemonic, 1), **fields)
    with pytest.raises(CheckError, match=message):
        check_program(program, plan, compiled.map.regions)


def test_checker_refuses_a_layer_without_pointers():
    model, config = random_model(3, kinds=("q4_1",)), dataclasses.replace(preset("tiny"), history_layers=4)
    compiled = compile_model(model, config, routers=make_routers(model, "reuse"))
    plan = make_plan(config, model.config, kv="reuse")
    for mnemonic, message in (("loadkv", "pointers have 4 layers, not 4"), ("storekv", "in layer 4 has no pointer")):
        program = changed(compiled.program, find(compiled.program, mnemonic), layer=4)
        with pytest.raises(CheckError, match=message):
            check_program(program, plan, compiled.map.regions)


@pytest.mark.parametrize(("fields", "message"), [
    ({"count": 1}, "consumes"), ({"list": RowList.ALL}, "consumes"), ({"list": RowList.ATTENTION}, "consumes")])
def test_checker_finds_early_weights_that_stay(routed, fields, message):
    compiled, plan = routed
    if plan.kv == "dense":
        assert not any(decode(word)[0].mnemonic == "dropw" for word in compiled.program.words)
        return
    with pytest.raises(CheckError, match=message):
        check_program(changed(compiled.program, find(compiled.program, "dropw"), **fields), plan, compiled.map.regions)


def test_checker_finds_a_route_that_needs_a_load_behind_early_weights(routed):
    """The weights of layer 1's keys before the router rows that decide whether anybody takes them."""
    compiled, plan = routed
    program = compiled.program
    keys = next(pc for pc, note in enumerate(program.notes) if note.tensor == "layers.1.k")
    rows = next(pc for pc, note in enumerate(program.notes) if note.tensor == "layers.1.routers")
    assert rows < keys and decode(program.words[keys])[0].mnemonic == "loadw"
    with pytest.raises(CheckError, match="behind|consumes"):
        check_program(moved(program, keys, rows), plan, compiled.map.regions)


def test_checker_finds_a_stream_that_nobody_takes(small):
    compiled, plan = small
    pc = find(compiled.program, "storel")
    words = list(compiled.program.words)
    words[pc] = encode("halt")
    with pytest.raises(CheckError, match="nobody takes"):
        check_program(Program(words, compiled.program.notes), plan, compiled.map.regions)


def test_checker_finds_an_endless_or_escaping_program(small):
    compiled, plan = small
    endless = changed(compiled.program, find(compiled.program, "branch"), imm=10**6)
    with pytest.raises(CheckError, match="runs to 1000000"):
        check_program(endless, plan, compiled.map.regions, [Arguments(0, 2, 0, 1)])


def test_every_argument_case_reaches_every_layer(small):
    compiled, plan = small
    for arguments in corner_arguments(plan):
        pcs = {pc for pc, *_ in walk(compiled.program, arguments)}
        layers = {compiled.program.notes[pc].layer for pc in pcs}
        assert layers == {-1, 0, 1}


def test_listing_assembles_to_the_same_words(small):
    program = small[0].program
    assert [assemble(line) for line in program.listing().splitlines()] == program.words
    assert {decode(word)[0].opcode for word in program.words} <= set(OPCODES)
    assert "layer 0 attention, layers.0.k" in program.describe(find(program, "loadw"))
    assert "outside the program" in program.describe(10**6)

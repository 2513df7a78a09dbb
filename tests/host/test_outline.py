"""Programs of shapes are the programs of models of that shape."""

import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.errors import CapacityError, RequestError
from skipopu.host.model import GROUPS
from skipopu.host.performance.fit import kinds_of
from skipopu.host.performance.geometries import GEOMETRIES, find_geometry
from skipopu.host.performance.outline import outline
from skipopu.host.routes import always_executing
from skipopu.hw.config import preset
from skipopu.hw.isa import decode

CASES = [("tiny", {}, ""), ("tiny", {"head_dim": 24, "heads": 4, "hidden": 96}, "reuse"),
         ("sim", {"head_dim": 16, "vocab": 300}, "dense"), ("sim", {"head_dim": 48, "heads": 6, "hidden": 96}, ""),
         ("tiny", {"heads": 6, "kv_heads": 3, "head_dim": 32}, "reuse")]


@pytest.mark.parametrize("name, geometry, kv", CASES)
@pytest.mark.parametrize("seed, kinds", [(1, None), (2, None), (3, GROUPS), (4, GROUPS)])
def test_same_program_and_addresses_as_the_compilers(name, geometry, kv, seed, kinds):
    model = random_model(seed, **geometry, **({"kinds": tuple(kinds)} if kinds else {}))
    compiled = compile_model(model, preset(name), 64, always_executing(model, kv) if kv else None, check=False)
    found = outline(model.config, preset(name), 64, kv=kv, kind=kinds_of(model))
    assert found.regions == compiled.map.regions
    assert found.port_bytes() == compiled.map.memory * preset(name).port_bits // 8
    for pc, (got, expected) in enumerate(zip(found.program.words, compiled.program.words, strict=True)):
        item, fields = decode(expected)
        if item.mnemonic == "matmul":  # the exponent of the largest scale is the only thing that contents decide
            assert {**decode(got)[1], "scale_exponent": 0} == {**fields, "scale_exponent": 0}, pc
        else:
            assert got == expected, pc


@pytest.mark.parametrize("group, per_weight", [("q4_0", 4.5), ("q4_g64", 4.25), ("q4_g128", 4.125), ("q4m_g128", 4.25)])
def test_scales_cost_what_their_group_says(group, per_weight):
    found = outline(GEOMETRIES["llama2-7b"], preset("u280"), 1152, kind=group)
    size = found.regions["layers.3.down"][1] * preset("u280").superbeat_bytes
    assert size == pytest.approx(4096 * 11008 * per_weight / 8, rel=1e-3)


@pytest.mark.parametrize("name", ["llama2-7b", "llama3.1-8b", "smollm2-135m"])
def test_large_shapes_need_no_weights(name):
    found = outline(GEOMETRIES[name], preset("u280"), 1152, kv="reuse")
    assert found.plan.chunk == preset("u280").tokens
    assert found.port_bytes() < 256 << 20


@pytest.mark.parametrize("arguments, error, message", [
    ({"kv": "maybe"}, RequestError, "kv must be reuse or dense, not 'maybe'"),
    ({"kind": "f16"}, RequestError, "weights must be q8_0, q4_0, q4_1, q4_g64, q4_g128, q4m_g64, q4m_g128, "
                                   "not 'f16'"),
])
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        outline(GEOMETRIES["smollm2-135m"], preset("sim"), 64, **arguments)
    with pytest.raises(CapacityError, match="llama2-7b does not fit configuration tiny"):
        outline(GEOMETRIES["llama2-7b"], preset("tiny"), 64)


def test_unknown_geometries_are_answered_with_the_known_ones():
    with pytest.raises(RequestError, match=r"unknown geometry 'llama2-70b', did you mean 'llama2-7b'\?; known: llama2"):
        find_geometry("llama2-70b")

"""Router files: what is saved comes back, and one clear line for each way to be wrong."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from skipopu.golden.random_model import random_model
from skipopu.host.errors import RouterError
from skipopu.host.routers import Routers, find_routers, load_routers, save_routers

MODEL = random_model(0)  # 2 layers, 64 wide
METADATA = {"format": "skipopu-routers", "version": "1", "kv": "dense", "base_model": "random-0", "layers": "2",
            "width": "64"}
LINEAR = {"difference": (2, 2, 64), "bias": (2, 2)}
TWO_LAYER = {"difference": (2, 2, 16), "bias": (2, 2), "hidden_weight": (2, 2, 16, 64), "hidden_bias": (2, 2, 16)}


def arrays(shapes=LINEAR, seed=0, **changed):
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: array for name, array in (drawn | changed).items() if array is not None}


def make(shapes=LINEAR, *, kv="dense", base="random-0", **changed):
    return Routers(kv=kv, base=base, **arrays(shapes, **changed))


@pytest.mark.parametrize("kv", ["dense", "reuse"])
@pytest.mark.parametrize("shapes", [LINEAR, TWO_LAYER], ids=["linear", "two-layer"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_saved_routers_come_back(tmp_path, kv, shapes, dtype):
    saved = make(shapes, kv=kv, difference=arrays(shapes)["difference"].astype(dtype))
    save_routers(tmp_path / "r.safetensors", saved)
    loaded = load_routers(tmp_path / "r.safetensors", MODEL)
    assert (loaded.kv, loaded.base, loaded.layers, loaded.width) == (kv, "random-0", 2, 64)
    assert loaded.is_linear == (shapes is LINEAR)
    for name in shapes:
        assert getattr(loaded, name).dtype == getattr(saved, name).dtype
        assert np.array_equal(getattr(loaded, name), getattr(saved, name))


@pytest.mark.parametrize(["make_it", "message"], [
    (lambda: make(kv="sparse"), "KV mode must be dense or reuse, not 'sparse'"),
    (lambda: make(base=""), "identity of their base model"),
    (lambda: make(hidden_bias=np.zeros((2, 2, 8), np.float32)), "both hidden_weight and hidden_bias, or neither"),
    (lambda: make(difference=np.zeros((2, 64), np.float32)), r"must be \[layers, 2, width\], not \[2, 64\]"),
    (lambda: make(difference=np.zeros((0, 2, 64), np.float32)), r"must be \[layers, 2, width\], not \[0, 2, 64\]"),
    (lambda: make(difference=np.zeros((2, 3, 64), np.float32)), r"difference must be \[2, 2, 64\], not \[2, 3, 64\]"),
    (lambda: make(bias=np.zeros((3, 2), np.float32)), r"bias must be \[2, 2\], not \[3, 2\]"),
    (lambda: make(bias=np.zeros((2, 2))), "bias must be float32, not float64"),
    (lambda: make(difference=np.zeros((2, 2, 64))), "difference must be float16 or float32, not float64"),
    (lambda: make(bias=np.full((2, 2), np.nan, np.float32)), r"bias holds NaN or infinity \(4 of 4\)"),
    (lambda: make(TWO_LAYER, hidden_weight=np.zeros((2, 2, 16), np.float32)), "layers, 2, inner, width"),
    (lambda: make(TWO_LAYER, difference=np.zeros((2, 2, 64), np.float32)), r"difference must be \[2, 2, 16\]"),
    (lambda: make(TWO_LAYER, hidden_bias=np.full((2, 2, 16), np.inf, np.float32)), "hidden_bias holds NaN or infinity"),
])
def test_impossible_routers_are_refused(make_it, message):
    with pytest.raises(RouterError, match=message):
        make_it()


@pytest.mark.parametrize(["routers", "message"], [
    (make(base="0123456789abcdef0123"), "with hash 0123456789abcdef, but random-0 has random-0"),
    (make({"difference": (3, 2, 64), "bias": (3, 2)}), "with layers 3, but random-0 has 2"),
    (make({"difference": (2, 2, 32), "bias": (2, 2)}), "with width 32, but random-0 has 64"),
])
def test_routers_of_another_model_are_refused(tmp_path, routers, message):
    save_routers(tmp_path / "r.safetensors", routers)
    with pytest.raises(RouterError, match=f"r.safetensors: these routers are for .*{message}"):
        load_routers(tmp_path / "r.safetensors", MODEL)


@pytest.mark.parametrize(["metadata", "tensors", "message"], [
    ({"format": None}, {}, "not a router file: .* format skipopu-routers, not 'none'"),
    ({"version": "3"}, {}, "router files of version 1 or 2 can be read, not '3'"),
    ({}, {"lora.q": np.zeros((2, 64, 2), np.float16)}, "unexpected tensors: lora.q"),
    ({"version": "2"}, {"lore.q": np.zeros((2, 64, 2), np.float16)}, "unexpected tensors: lore.q"),
    ({"kv": "both"}, {}, "KV mode must be dense or reuse, not 'both'"),
    ({"kv": None, "width": None}, {}, "the metadata lacks kv, width"),
    ({"layers": "3"}, {}, "the metadata has layers 3, but the tensors 2"),
    ({}, {"bias": None}, "missing tensors: bias"),
    ({}, {"extra": np.zeros(1, np.float32), "also": np.zeros(1, np.float32)}, "unexpected tensors: also, extra"),
    ({}, {"hidden_bias": np.zeros((2, 2, 8), np.float32)}, "missing tensors: hidden_weight"),
    ({}, {"bias": np.zeros((2, 2), np.int32)}, "tensor bias must be F16 or F32, not I32"),
    ({}, {"difference": np.full((2, 2, 64), np.inf, np.float32)}, "router difference holds NaN or infinity"),
])
def test_a_bad_file_gets_one_clear_line(tmp_path, metadata, tensors, message):
    about = {key: value for key, value in (METADATA | metadata).items() if value is not None}
    save_file(arrays(**tensors), tmp_path / "r.safetensors", about)
    with pytest.raises(RouterError, match=f"r.safetensors: {message}") as error:
        load_routers(tmp_path / "r.safetensors", MODEL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100])
def test_a_damaged_or_absent_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "r.safetensors").write_bytes(content)
    with pytest.raises(RouterError, match="r.safetensors: not a readable safetensors file"):
        load_routers(tmp_path / "r.safetensors")


def test_only_linear_routers_run_on_the_overlay():
    make().require_linear()
    with pytest.raises(RouterError, match=r"two-layer routers \(hidden width 16\) run in the reference only"):
        make(TWO_LAYER).require_linear()


# other operating points

def test_an_operating_point_lies_between_the_noted_ones(tmp_path):
    difference, bias = arrays()["difference"], arrays()["bias"]
    difference[0, 0], bias[0, 0] = 0, 1  # executes for every input, at every point
    notes = {"points": "[[0.3, -16], [0.2, 0], [0.1, 32]]"}
    save_routers(tmp_path / "r", make(difference=difference, bias=bias, notes=notes))
    own = load_routers(tmp_path / "r")
    for rate, shift in ((0.3, -16), (0.2, 0), (0.1, 32), (0.15, 16), (0.25, -8)):
        moved = find_routers(f"{tmp_path}/r@{rate}")
        expected = own.bias + np.float32(shift)
        expected[0, 0] = own.bias[0, 0]
        assert np.array_equal(moved.difference, own.difference)
        assert moved.bias == pytest.approx(expected, abs=1e-5) and moved.bias.dtype == np.float32


@pytest.mark.parametrize(["points", "rate", "message"], [
    (None, "0.1", "these routers carry no other operating points"),
    ("[]", "0.1", "these routers carry no other operating points"),
    ("[[0.3, 0], [0.1, 8]]", "0.31", r"these routers skip 10.0% to 30.0% of the weights, not 31.0%"),
    ("[[0.3, 0], [0.1, 8]]", "0.05", r"these routers skip 10.0% to 30.0% of the weights, not 5.0%"),
    ("[[0.3, 0], [0.1", "0.2", "the operating points in the metadata cannot be read"),
    ("[[0.3], [0.1, 8]]", "0.2", "the operating points in the metadata cannot be read"),
    ("[[0.3, 0], [0.1, NaN]]", "0.2", "the operating points in the metadata cannot be read"),
    ("7", "0.2", "the operating points in the metadata cannot be read"),
])
def test_impossible_operating_points_are_named(tmp_path, points, rate, message):
    save_routers(tmp_path / "r", make(notes={} if points is None else {"points": points}))
    with pytest.raises(RouterError, match=f"r@{rate}: {message}") as error:
        find_routers(f"{tmp_path}/r@{rate}")
    assert "\n" not in str(error.value) and str(error.value).count("/r") == 1


def test_an_operating_point_of_no_file_is_a_missing_file():
    with pytest.raises(RouterError, match="nobody@0.1: no such router file or name"):
        find_routers("nobody@0.1")

"""Routed programs on the bit-exact functional machine: near the routed reference, same bits however chunked."""

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.golden.routed import RoutedReference
from skipopu.golden.routed_cases import routed_case, routed_names
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.routes import RandomRoutes, always_executing
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset

# Root mean square of a row's error, in units of that of the logits: as without routers.
BOUND = 0.01
STEPS = 3


def loaded(case, config):
    compiled = compile_model(case.model, config, routers=case.routers)
    device = open_device("functional", config, compiled.map.memory * config.port_bits // 8)
    return Accelerator(device, compiled, force=case.force)


def continued(accelerator, case):
    """(tokens, logits of all): the prompt in chunks, then greedy steps where routes are forced."""
    tokens, rows = list(case.prompt), list(accelerator.evaluate(case.prompt))
    for _ in range(STEPS if case.force is not None else 0):
        tokens.append(int(rows[-1][-1].argmax()))
        accelerator.step(tokens[-1])
        rows.append(accelerator.logits())
    return tokens, np.concatenate(rows)


@pytest.mark.parametrize(("name", "preset_name"), [(name, "tiny") for name in routed_names()] + [
    (name, "sim") for name in routed_names() if name.endswith("reuse")])
def test_logits_and_decisions_are_those_of_the_routed_reference(name, preset_name):
    case, config = routed_case(name, preset(preset_name)), preset(preset_name)
    accelerator = loaded(case, config)
    tokens, got = continued(accelerator, case)
    reference = RoutedReference(case.model, case.routers, force=case.force)
    want = reference.forward(tokens).numpy()
    np.testing.assert_array_equal(accelerator.decisions, reference.decisions)
    error = np.sqrt(np.square(got - want).mean(axis=1) / np.square(want).mean())
    assert error.max() < BOUND, f"row {error.argmax()} of {len(error)}"


@pytest.mark.parametrize("kv", ["dense", "reuse"])
def test_a_tie_executes_and_one_unit_below_skips(kv):
    case = routed_case(f"ties, {kv}", preset("tiny"))
    accelerator = loaded(case, preset("tiny"))
    accelerator.prefill(case.prompt)
    assert accelerator.decisions[0, :, 0].tolist() == [False, True]  # attention's score is one unit below, MLP's is 0
    assert accelerator.decisions[1:].all()


@pytest.mark.parametrize("name", [name for name in routed_names() if name.startswith(("own", "chunk", "random"))])
def test_chunks_of_any_length_give_the_same_bits(name):
    config = preset("tiny")
    case, rng = routed_case(name, config), np.random.default_rng(1)
    first, second, rows = loaded(case, config), loaded(case, config), []
    whole = np.concatenate(list(first.evaluate(case.prompt)))
    while second.position < len(case.prompt):
        part = case.prompt[second.position :][: int(rng.integers(1, second.map.chunk + 1))]
        second.run(part, 0, len(part))
        rows.append(second.logits())
    np.testing.assert_array_equal(np.concatenate(rows).view(np.uint32), whole.view(np.uint32))
    np.testing.assert_array_equal(first.decisions, second.decisions)


@pytest.mark.parametrize("kv", ["dense", "reuse"])
def test_routers_that_skip_nothing_change_no_bit(kv):
    model, config = random_model(3, kinds=("q4_1",)), preset("tiny")
    prompt = np.random.default_rng(0).integers(0, 96, 21).tolist()
    logits = []
    for routers in (None, always_executing(model, kv)):
        compiled = compile_model(model, config, routers=routers)
        device = open_device("functional", config, compiled.map.memory * config.port_bits // 8)
        logits.append(np.concatenate(list(Accelerator(device, compiled).evaluate(prompt))))
    np.testing.assert_array_equal(*logits)


def counters(kv, rate, count=24, chunked=False):
    model, config = random_model(3, kinds=("q4_1",), layers=6), preset("tiny")
    compiled = compile_model(model, config, routers=always_executing(model, kv))
    device = open_device("functional", config, compiled.map.memory * config.port_bits // 8)
    accelerator = Accelerator(device, compiled, force=RandomRoutes(rate, 5))
    prompt = np.random.default_rng(0).integers(0, 96, count).tolist()
    for first in range(0, count, 4 if chunked else 1):
        accelerator.run(prompt[first : first + (4 if chunked else 1)])
    total = {name: sum(run.counters[name] for run in accelerator.stats) for name in accelerator.stats[0].counters}
    return total, accelerator


def test_weights_of_skipped_modules_are_not_read():
    """One token at a time, the weights read are those of the modules that run, and the early part of the keys."""
    (everything, accelerator), (nothing, _) = counters("dense", 0.0), counters("dense", 1.0)
    streams = {name: size for name, (_, size) in accelerator.map.regions.items() if name.startswith("layers.")}
    keys = sum(streams[f"layers.{layer}.{part}"] for layer in range(6) for part in "kv")
    linear = sum(size for name, size in streams.items() if name.rpartition(".")[2] in
                 ("q", "k", "v", "o", "gate_up", "down"))
    first = streams["layers.0.q"] + streams["layers.0.o"]  # its attention is not skipped at random
    assert (everything["weights_read"], nothing["weights_read"]) == (24 * linear, 24 * (keys + first))
    assert everything["dropped"] < nothing["dropped"] and nothing["kv_read"] < everything["kv_read"]
    some, skipping = counters("reuse", 0.25)
    ran = skipping.decisions
    part = {module: [sum(streams[f"layers.{layer}.{name}"] for name in names) for layer in range(6)]
            for module, names in enumerate([("q", "k", "v", "o"), ("gate_up", "down")])}
    least = sum(int(ran[layer, module].sum()) * part[module][layer] for layer in range(6) for module in range(2))
    dropped = sum(int((~ran[layer, 0]).sum()) for layer in range(6))
    prefetched = dropped * max(streams[f"layers.{layer}.k"] for layer in range(6))
    assert least <= some["weights_read"] <= least + prefetched + 24 * keys // 6


@pytest.mark.parametrize("chunked", [False, True], ids=["decode", "prefill"])
def test_reuse_writes_as_many_records_as_attention_ran(chunked):
    total, accelerator = counters("reuse", 0.25, chunked=chunked)
    ran = accelerator.decisions[:, 0].copy()
    ran[0] = True  # the first layer computes keys and values of every token
    everything, _ = counters("dense", 0.25, chunked=chunked)
    assert total["kv_written"] * ran.size == everything["kv_written"] * ran.sum()
    assert 0.7 < ran.mean() < 0.9

"""The runtime against a float machine: results, and every mistake a user can make."""

import numpy as np
import pytest
from float_machine import FloatDevice
from skipopu.golden.device import FunctionalDevice
from skipopu.golden.random_model import random_model
from skipopu.golden.reference import ReferenceModel
from skipopu.host.compiler import compile_model
from skipopu.host.errors import DeviceError, RequestError, RouterError
from skipopu.host.plan import KvSizes
from skipopu.host.routes import RandomRoutes, always_executing, routes_from_words, words_of_routes
from skipopu.host.runtime import Accelerator
from skipopu.host.sampling import Sampler, Sampling
from skipopu.hw.config import preset
from skipopu.hw.registers import FaultCause, Status, address

CONFIG = preset("tiny")
PROMPT = [5, 17, 60, 2, 9, 33]


@pytest.fixture(scope="module")
def model():
    return random_model(8, kinds=("q8_0",), eos_ids=(1,))


@pytest.fixture(scope="module")
def compiled(model):
    return compile_model(model, CONFIG, context=16)


@pytest.fixture
def device(compiled):
    return FloatDevice(CONFIG, compiled.map.memory * CONFIG.port_bits // 8)


@pytest.fixture
def accelerator(device, compiled):
    return Accelerator(device, compiled)


def reference_tokens(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(ReferenceModel(model).forward(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_generation_follows_the_reference(accelerator, model):
    assert list(accelerator.generate(PROMPT, 6, stop=())) == reference_tokens(model, PROMPT, 6)
    assert accelerator.finish == "length"
    assert accelerator.position == len(PROMPT) + 5
    chunks = [(run.position, run.tokens, run.head_rows) for run in accelerator.stats]
    assert chunks == [(0, 4, 0), (4, 2, 1), (6, 1, 1), (7, 1, 1), (8, 1, 1), (9, 1, 1), (10, 1, 1)]


def test_the_context_continues_over_calls_and_clear_forgets_it(accelerator, model):
    first = accelerator.prefill(PROMPT[:3])
    assert accelerator.prefill(PROMPT[3:]) == reference_tokens(model, PROMPT, 1)[0]
    accelerator.clear()
    assert accelerator.prefill(PROMPT[:3]) == first


def test_generation_stops_at_stop_tokens_and_when_the_context_is_full(accelerator, model):
    expected = reference_tokens(model, PROMPT, 11)
    assert list(accelerator.generate(PROMPT, 50, stop=())) == expected
    assert accelerator.finish == "context" and accelerator.position == 16
    accelerator.clear()
    stop = expected[4]
    assert list(accelerator.generate(PROMPT, 50, stop=[stop])) == expected[: expected.index(stop)]
    assert accelerator.finish == "stop"


def test_image_is_loaded_once(accelerator, device, monkeypatch):
    monkeypatch.setattr(device, "write_memory", None)
    assert len(list(accelerator.generate(PROMPT, 3, stop=()))) == 3


def test_sampling_repeats_with_its_seed_and_differs_without(accelerator):
    def drawn(seed):
        accelerator.clear()
        return list(accelerator.generate(PROMPT, 8, Sampling(temperature=2.0, seed=seed), stop=()))
    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-6)], ids=str)
def test_narrow_sampling_is_greedy(sampling):
    logits = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    assert {Sampler(sampling).choose(logits) for _ in range(5)} == {int(logits.argmax())}


def test_sampled_frequencies_follow_the_probabilities():
    logits = np.log(np.float32([0.1, 0.2, 0.3, 0.4]))
    def shares(**settings):
        sampler = Sampler(Sampling(**settings))
        return np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(shares(), [0.1, 0.2, 0.3, 0.4], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 0, 3 / 7, 4 / 7], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.75), [0, 2 / 9, 3 / 9, 4 / 9], atol=0.03)
    np.testing.assert_allclose(shares(temperature=0.5), np.array([1, 4, 9, 16]) / 30, atol=0.03)


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": 0}, "temperature must be above 0"), ({"temperature": float("nan")}, "temperature"),
    ({"top_k": -1}, "top_k must be 0"), ({"top_p": 0}, "top_p must be"), ({"top_p": 1.5}, "top_p must be")])
def test_sampling_settings_out_of_range(settings, message):
    with pytest.raises(RequestError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "the prompt is empty"), ([96], r"token ids must be 0\.\.95, not 96"), ([3, -1], "not -1"),
    ([1] * 17, "17 tokens do not fit: the context holds 16 positions, 0 are used")])
def test_bad_prompts(accelerator, device, prompt, message):
    for attempt in (accelerator.prefill, lambda tokens: list(accelerator.generate(tokens, 1)),
                    lambda tokens: list(accelerator.evaluate(tokens))):
        with pytest.raises(RequestError, match=message):
            attempt(prompt)
    assert device.runs == 0 and accelerator.position == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (([1] * 5,), r"a run takes 1\.\.4 tokens"), (([1, 2], 1, 2), r"head rows 1\.\.2 are not in the 2 rows")])
def test_bad_runs(accelerator, arguments, message):
    with pytest.raises(RequestError, match=message):
        accelerator.run(*arguments)


def test_count_must_be_positive(accelerator):
    with pytest.raises(RequestError, match="count must be at least 1"):
        next(accelerator.generate(PROMPT, 0))


def test_a_fault_names_the_instruction_and_reset_recovers(accelerator, device, compiled):
    pc = next(pc for pc, note in enumerate(compiled.program.notes) if note.tensor == "layers.1.down")
    device.fail = (FaultCause.READ_ERROR, pc)
    with pytest.raises(DeviceError, match=rf"READ_ERROR \(port 0\) at instruction {pc} \(layer 1 mlp, .*down\): loadw"):
        accelerator.prefill(PROMPT)
    device.fail = None
    accelerator.reset()
    assert 0 <= accelerator.prefill(PROMPT) < 96


@pytest.mark.parametrize(("cause", "message"), [
    (FaultCause.KV_FULL,
     r"memory for KV records is full: all 13 places behind port 0 are taken, in the run at position 0; tokens skip "
     r".* larger --kv-share, or begin anew \(KV_FULL \(port 0\) at .*kv.1"),
    (FaultCause.KV_POINTER,
     r"the pointer of a KV record behind port 0 is damaged, or names no record of this sequence; nothing was read .*: "
     r"reset the device and begin anew \(KV_POINTER .*kv.1"),
])
def test_faults_of_kv_records_are_said_in_words(model, cause, message):
    routed = compile_model(model, CONFIG, context=16, routers=always_executing(model, "reuse"), kv=KvSizes(share=0.8))
    device = FloatDevice(CONFIG, routed.map.memory * CONFIG.port_bits // 8)
    accelerator = Accelerator(device, routed)
    device.fail = cause, next(pc for pc, note in enumerate(routed.program.notes) if note.tensor == "kv.1")
    with pytest.raises(DeviceError, match=message):
        accelerator.prefill(PROMPT)


def test_memory_for_kv_records_runs_out_or_suffices(model):
    """On the functional level: nobody skips, so that less than all of the memory is not enough, until one does."""
    for share, rate in ((0.8, 0.0), (1.0, 0.0), (0.8, 0.4)):
        routed = compile_model(model, CONFIG, context=16, routers=always_executing(model, "reuse"),
                               kv=KvSizes(share=share))
        device = FunctionalDevice(CONFIG, routed.map.memory * CONFIG.port_bits // 8)
        accelerator = Accelerator(device, routed, force=RandomRoutes(rate, 1))
        tokens = list(range(16))
        if share < 1 and not rate:
            with pytest.raises(DeviceError, match="memory for KV records is full: all 13 places behind port"):
                accelerator.prefill(tokens)
            accelerator.reset()
            accelerator.prefill(tokens[:8])
        else:
            for _ in range(2):  # a sequence that begins has all of it again
                accelerator.prefill(tokens)
                accelerator.clear()


def test_a_damaged_pointer_stops_the_run_with_one_line(model):
    routed = compile_model(model, CONFIG, context=16, routers=always_executing(model, "reuse"))
    device = FunctionalDevice(CONFIG, routed.map.memory * CONFIG.port_bits // 8)
    accelerator = Accelerator(device, routed)
    accelerator.prefill(PROMPT)
    device.machine.kv.places[0, 1, 0] = 99  # of position 1 in layer 0
    with pytest.raises(DeviceError, match=r"the pointer of a KV record behind port 1 is damaged.*layer 0.*loadkv"):
        accelerator.step(3)
    accelerator.reset()
    accelerator.prefill(PROMPT)


def test_forced_routes_reach_the_device_and_come_back(model):
    routed = compile_model(model, CONFIG, context=16, routers=always_executing(model, "reuse"))
    force = RandomRoutes(0.5, 1)
    accelerator = Accelerator(FloatDevice(CONFIG, routed.map.memory * CONFIG.port_bits // 8), routed, force=force)
    assert accelerator.decisions.shape == (2, 2, 0)
    accelerator.prefill(PROMPT)
    accelerator.step(3)
    np.testing.assert_array_equal(accelerator.decisions, force.bits(2, 0, 7))
    assert [run.routes.shape[2] for run in accelerator.stats] == [4, 2, 1]
    accelerator.reset()  # sets the device up again, with forced routes
    accelerator.prefill(PROMPT[:3])
    np.testing.assert_array_equal(accelerator.decisions, force.bits(2, 0, 3))


def test_routes_in_registers():
    routes = np.random.default_rng(0).random((5, 2, 32)) < 0.5
    words = words_of_routes(routes)
    assert len(words) == 10 and words[3] == sum(1 << t for t in range(32) if routes[1, 1, t])
    np.testing.assert_array_equal(routes_from_words(words, 32), routes)


@pytest.mark.parametrize(("force", "message"), [
    (RandomRoutes(0.5), "can be forced only on a model that was compiled with routers"),
    (np.ones((2, 2, 4), bool), "can be forced only")])
def test_forced_routes_need_a_routed_program(device, compiled, force, message):
    with pytest.raises(RouterError, match=message):
        Accelerator(device, compiled, force=force)


@pytest.mark.parametrize(("force", "message"), [
    (np.ones((3, 2, 4), bool), r"must be bool \[2, 2, tokens\], not bool \[3, 2, 4\]"),
    (np.ones((2, 2, 4), bool), "cover 4 positions, but 6 are needed")])
def test_forced_routes_that_do_not_fit(model, force, message):
    routed = compile_model(model, CONFIG, context=16, routers=always_executing(model, "dense"))
    with pytest.raises(RouterError, match=message):
        Accelerator(FloatDevice(CONFIG, routed.map.memory * CONFIG.port_bits // 8), routed, force=force).prefill(PROMPT)


def test_device_of_another_configuration(compiled):
    other = preset("sim")
    with pytest.raises(DeviceError, match="compiled for configuration tiny, the device is sim"):
        Accelerator(FloatDevice(other, 1 << 20), compiled)


def test_device_that_says_it_is_something_else(device, compiled, monkeypatch):
    monkeypatch.setitem(device._registers, address("LANES"), 64)
    with pytest.raises(DeviceError, match="register LANES must read 0x8 for configuration tiny, not 0x40"):
        Accelerator(device, compiled)


def test_device_with_too_little_memory(compiled):
    with pytest.raises(DeviceError, match="the model needs .* bytes behind each port, the device has 4096"):
        Accelerator(FloatDevice(CONFIG, 4096), compiled)


def test_device_that_never_finishes(compiled, device, monkeypatch):
    accelerator = Accelerator(device, compiled, timeout=0.01)
    monkeypatch.setattr(device, "start", lambda: None)
    monkeypatch.setitem(device._registers, address("STATUS"), Status.RUNNING)
    with pytest.raises(DeviceError, match="did not finish within 0.01 s; it is at instruction 0"):
        accelerator.prefill(PROMPT)

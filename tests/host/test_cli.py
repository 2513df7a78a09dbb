"""The command line: what each command prints, and one line for every mistake."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from skipopu.golden.device import FunctionalDevice
from skipopu.golden.random_model import random_model, write_gguf
from skipopu.host import devices
from skipopu.host.bundle import save_bundle
from skipopu.host.chat import ChatTemplate
from skipopu.host.cli import main
from skipopu.host.compiler import compile_model
from skipopu.host.load import load_model
from skipopu.host.routers import Routers, load_routers, save_routers
from skipopu.host.tokenizer import Tokenizer
from skipopu.hw.config import preset
from skipopu.hw.isa import encode
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

GENERATE_KEYS = {"text", "tokens", "prompt_tokens", "device", "config", "seconds", "tokens_per_second", "cycles",
                 "cycles_per_token", "bytes_read", "bytes_written", "bandwidth_efficiency", "array_utilisation",
                 "skip_attention", "skip_mlp", "kv_bytes_written", "weight_bytes_read"}
TINY = ("--config", "tiny")
PROMPT = ("--prompt-tokens", "5,17,9")


class Wrong(FunctionalDevice):
    """One bit of what every VSWIGLU writes is wrong."""

    def execute(self, run):
        def disturb(pc, item, values, writes):
            if item.mnemonic == "vswiglu":
                self.machine.mbuf[writes[0].rows[0], 1] ^= 64
        self.machine.observer = disturb
        return super().execute(run)


class Counting(FunctionalDevice):
    """Ten cycles for each instruction, the array busy in four of them."""

    def execute(self, run):
        outcome = super().execute(run)
        count = outcome.registers["INSTRUCTIONS"]
        outcome.registers.update(CYCLES=10 * count, ARRAY_ACTIVE=4 * count)
        return outcome


class Call:
    """Runs the command in this process."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    def good(self, *arguments):
        code, out, err = self(*arguments)
        assert code == 0, err
        return out, err

    def json(self, *arguments):
        out, _ = self.good(*arguments, "--json")
        assert out.count("\n") == 1
        return json.loads(out)

    def bad(self, *arguments):
        """The one line of an error."""
        code, out, err = self(*arguments)
        assert code == 1 and out == "" and err.count("\n") == 1 and err.startswith("skipopu: "), (code, out, err)
        return err.removeprefix("skipopu: ").rstrip("\n")


@pytest.fixture
def call(capsys):
    return Call(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model.gguf, without tokenizer; text.skpu, compiled for tiny, with one; tokens.npz."""
    folder = tmp_path_factory.mktemp("models")
    write_gguf(random_model(8, kinds=("q4_1",)), folder / "model.gguf")
    vocab = {character: index for index, character in enumerate("abcdefgh")} | {"Ġ": 8}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Tokenizer(backend, byte_level=True, strip_space=False, bos_id=None, add_bos=False)
    model = random_model(5, kinds=("q4_1",), vocab=32)
    compiled = compile_model(model, preset("tiny"), context=24)
    object.__setattr__(compiled, "tokenizer", tokenizer)
    object.__setattr__(compiled, "chat", ChatTemplate("ab{{ messages[0].content }}h"))
    save_bundle(folder / "text.skpu", compiled)
    rng = np.random.default_rng(1)
    loaded = load_model(folder / "model.gguf")
    routers = Routers(kv="reuse", base=loaded.identity, bias=np.zeros((2, 2), np.float32),
                      difference=np.random.default_rng(0).standard_normal((2, 2, 64)).astype(np.float16))
    save_routers(folder / "routers", routers)
    two_layer = Routers(kv="dense", base=loaded.identity, difference=np.zeros((2, 2, 8), np.float32),
                        bias=np.zeros((2, 2), np.float32), hidden_weight=np.ones((2, 2, 8, 64), np.float32),
                        hidden_bias=np.zeros((2, 2, 8), np.float32))
    save_routers(folder / "two-layer", two_layer)
    save_routers(folder / "foreign", Routers(kv="dense", base="00" * 32, difference=routers.difference,
                                             bias=routers.bias))
    np.savez(folder / "tokens.npz", tokens=rng.integers(0, 96, (3, 12)).astype(np.uint16))
    return folder


@pytest.fixture
def model(folder):
    return ("-m", folder / "model.gguf")


@pytest.fixture
def known_devices(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "wrong", f"{__name__}:Wrong")
    monkeypatch.setitem(devices.DEVICES, "counting", f"{__name__}:Counting")


# generate

def test_generate_reports_all_keys(call, model):
    report = call.json("generate", *model, *PROMPT, *TINY, "-n", 4)
    assert GENERATE_KEYS <= set(report)
    assert report["prompt_tokens"] == [5, 17, 9] and len(report["tokens"]) == 4
    assert (report["device"], report["config"], report["text"], report["cycles"]) == ("functional", "tiny", None, None)
    assert report["bytes_read"] > 0 and report["seconds"] >= report["prompt_seconds"] > 0
    assert set(report["labels"].values()) <= {"measured", "simulated", "predicted"}
    assert GENERATE_KEYS - set(report["labels"]) == {"text", "tokens", "prompt_tokens", "device", "config"}


def test_reference_and_functional_continue_alike(call, model):
    found = {device: call.json("generate", *model, *PROMPT, *TINY, "--device", device, "-n", 6)
             for device in ("reference", "functional")}
    assert found["reference"]["tokens"] == found["functional"]["tokens"]
    assert found["reference"]["config"] is None and found["reference"]["bytes_read"] is None


def test_cycles_become_rates_of_decode(call, model, known_devices):
    report = call.json("generate", *model, "--prompt-tokens", "1,2,3,4,5,6", *TINY, "--device", "counting", "-n", 3)
    assert report["cycles"] > 3 * report["cycles_per_token"] > 0
    assert report["array_utilisation"] == pytest.approx(0.4)
    assert 0 < report["bandwidth_efficiency"]
    _, err = call.good("generate", *model, *PROMPT, *TINY, "--device", "counting", "-n", 3)
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["prompt", "generated", "cycles", "memory", "decode"]
    assert all("(measured)" in line or "(simulated)" in line for line in lines)


def test_generate_on_the_rtl_reports_cycles(call, model):
    arguments = ("generate", *model, *PROMPT, *TINY, "-n", 4)
    report = call.json(*arguments, "--device", "rtl")
    assert report["tokens"] == call.json(*arguments)["tokens"]
    assert report["cycles"] > 3 * report["cycles_per_token"] > 0 and report["bytes_read"] > 0
    assert 0 < report["bandwidth_efficiency"] <= 1 and 0 < report["array_utilisation"] <= 1


def test_tokens_stream_to_stdout_and_timings_to_stderr(call, model):
    out, err = call.good("generate", *model, *PROMPT, *TINY, "-n", 4)
    report = call.json("generate", *model, *PROMPT, *TINY, "-n", 4)
    assert out == " ".join(map(str, report["tokens"])) + "\n"
    assert "tokens/s of decode on this machine (measured)" in err


def test_text_and_chat_prompts(call, folder):
    bundle = ("-m", folder / "text.skpu")
    plain, chat = (call.json("generate", *bundle, "-p", "dad", "-n", 3, *extra) for extra in ((), ("--chat",)))
    assert plain["prompt_tokens"] == [3, 0, 3] and chat["prompt_tokens"] == [0, 1, 3, 0, 3, 7]
    assert plain["text"] is not None and plain["config"] == "tiny"
    out, _ = call.good("generate", *bundle, "-p", "dad", "-n", 3)
    assert out == plain["text"] + "\n"


def test_sampling_follows_its_seed(call, model):
    def tokens(*options):
        return tuple(call.json("generate", *model, *PROMPT, *TINY, "-n", 6, *options)["tokens"])
    assert tokens("--temp", 0) == tokens("--temp", 2, "--top-k", 1) == tokens("--top-p", 1e-9) == tokens()
    assert tokens("--temp", 3, "--seed", 4) == tokens("--temp", 3, "--seed", 4)
    assert len({tokens("--temp", 3, "--seed", seed) for seed in range(3)}) > 1


def test_generation_ends_with_the_context(call, model):
    report = call.json("generate", *model, *PROMPT, *TINY, "-n", 50, "--context", 8)
    assert report["finish"] == "context" and len(report["tokens"]) == 6


# compare, eval, compile, disasm, verilog, models

def test_compare_finds_equal_devices_equal(call, model):
    arguments = ("compare", *model, *PROMPT, *TINY, "-n", 3, "--devices", "functional,functional")
    out, _ = call.good(*arguments)
    assert out.startswith("functional and functional are equal bit for bit: 480 logits of 3 runs (simulated), 3 tokens")
    report = call.json(*arguments)
    assert report["equal"] and report["difference"] is None and report["logits"] == 5 * 96


def test_compare_names_the_first_difference(call, model, known_devices):
    arguments = ("compare", *model, *PROMPT, *TINY, "-n", 3, "--devices", "functional,wrong")
    code, out, err = call(*arguments)
    assert code == 1 and err == ""
    assert "functional and wrong differ after 0 tokens" in out
    assert "(layer 0 mlp, layers.0.gate_up): vswiglu " in out and "MBUF row" in out and "expected 0x" in out
    code, out, _ = call(*arguments, "--json")
    assert json.loads(out)["weight_bytes_read"] is None  # parts of runs were repeated
    difference = json.loads(out)["difference"]
    assert code == 1 and difference["tensor"] == "layers.0.gate_up" and difference["place"] == "MBUF"


@pytest.mark.parametrize("device", ["functional", "reference"])
def test_eval_compares_with_the_reference(call, model, folder, device):
    arguments = ("eval", *model, "--tokens", folder / "tokens.npz", *TINY, "--limit", 2, "--device", device)
    report = call.json(*arguments)
    assert {"perplexity", "reference_perplexity", "kl", "top1", "tokens"} <= set(report)
    assert report["tokens"] == 2 * 11
    assert report["perplexity"] == pytest.approx(report["reference_perplexity"], rel=0.02)
    assert (report["kl"], report["top1"]) == (0, 1) if device == "reference" else 0 < report["kl"] < 0.01
    out, _ = call.good(*arguments)
    assert all("(measured)" in line or "(simulated)" in line for line in out.splitlines())


def test_weights_of_another_kind(call, model, folder, tmp_path):
    """Quantised again: evaluated against the model as it is, compiled into a bundle that keeps them."""
    arguments = ("eval", *model, "--tokens", folder / "tokens.npz", *TINY, "--limit", 2)
    found = [call.json(*arguments, "--weights", kind) for kind in ("q8_0", "q4_g128")]
    assert found[0]["reference_perplexity"] == found[1]["reference_perplexity"] and found[0]["kl"] < found[1]["kl"]
    bundle = tmp_path / "model.skpu"
    call.good("compile", *model, "--weights", "q4_g128", "-o", bundle, *TINY, "--context", 32)
    assert (call.json("generate", "-m", bundle, *PROMPT, "-n", 4)["tokens"]
            == call.json("generate", *model, *PROMPT, *TINY, "-n", 4, "--weights", "q4_g128")["tokens"])
    for wrong, message in ((model, "weights can be quantised to f32, f16, q8_0, q4_0, "),
                           (("-m", bundle), "a bundle is")):
        code, out, err = call("generate", *wrong, *PROMPT, "--weights", "q3")
        assert code == 1 and not out and message in err and err.count("\n") == 1


def test_compile_then_generate_and_disassemble(call, model, folder, tmp_path):
    bundle = tmp_path / "model.skpu"
    summary = call.json("compile", *model, "-o", bundle, *TINY, "--context", 16)
    assert (summary["configuration"], summary["context"]) == ("tiny", 16)
    assert summary["file_bytes"] == bundle.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.skpu"]
    assert (call.json("generate", "-m", bundle, *PROMPT, "-n", 4)["tokens"]
            == call.json("generate", *model, *PROMPT, *TINY, "-n", 4)["tokens"])
    listing, _ = call.good("disasm", bundle)
    lines = listing.splitlines()
    assert len(lines) == summary["instructions"] and lines[-1].startswith("halt  # ")
    assert any(line.startswith("vswiglu ") and line.endswith("layer 1 mlp, layers.1.gate_up") for line in lines)


def test_verilog_is_written(call, tmp_path):
    out, _ = call.good("verilog", *TINY, "-o", tmp_path / "top.v")
    text = (tmp_path / "top.v").read_text()
    assert "module skipopu_top(" in text.replace(" (", "(") and "m1_axi_araddr" in text
    assert out.endswith(f"skipopu_top for configuration tiny ({preset('tiny').config_hash:#010x})\n")


def test_models_are_listed(call):
    out, _ = call.good("models")
    assert out.startswith("smollm2  SmolLM2-135M-Instruct")
    assert call.json("models")["models"][0]["name"] == "smollm2"


def test_help_is_quick():
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "import sys; from skipopu.host.cli import main\n"
                           "try: main(['--help'])\nfinally: print([name for name in ('torch', 'amaranth', 'numpy') "
                           "if name in sys.modules])"], capture_output=True, text=True)
    assert "generate" in done.stdout and done.stdout.endswith("[]\n"), done.stdout + done.stderr
    assert time.perf_counter() - began < 5  # under load; alone it takes a few tenths


# routers

@pytest.mark.parametrize("kv", ["dense", "reuse"])
def test_routed_generation_reports_what_was_skipped(call, model, folder, kv):
    arguments = ("generate", *model, *PROMPT, *TINY, "-n", 8, "--kv", kv)
    plain, nothing = call.json(*arguments[:-2]), call.json(*arguments, "--force-skip", 0)
    assert plain["skip_attention"] is None and (nothing["skip_attention"], nothing["skip_mlp"]) == (0, 0)
    assert plain["tokens"] == nothing["tokens"] and plain["weight_bytes_read"] == nothing["weight_bytes_read"] > 0
    routed = [call.json(*arguments, *extra) for extra in (
        ("--routers", folder / "routers"), ("--force-skip", 0.5, "--seed", 3), ("--force-skip", 0.5, "--seed", 4))]
    for report in routed:
        assert 0 < report["skip_attention"] < 1 and 0 < report["skip_mlp"] < 1
        assert report["weight_bytes_read"] < plain["weight_bytes_read"]
        # the first layer computes keys and values of every token, of two
        share = 1 - report["skip_attention"] if kv == "reuse" else 1
        assert plain["kv_bytes_written"] * share <= report["kv_bytes_written"] <= plain["kv_bytes_written"]
    assert routed[1]["skip_mlp"] != routed[2]["skip_mlp"]
    for extra, report in zip((("--routers", folder / "routers"), ("--force-skip", 0.5, "--seed", 3)), routed):
        reference = call.json(*arguments, *extra, "--device", "reference")
        assert reference["tokens"] == report["tokens"]
        assert reference["skip_attention"] == pytest.approx(report["skip_attention"])


def test_skipgpt_checkpoints_are_routers_too(call, model, folder, tmp_path):
    routers = load_routers(folder / "routers")
    tensors = {}
    for layer in range(2):
        for index, module in enumerate(("attention", "mlp")):
            name = f"model.layers.{layer}.router_{module}.weight_predictor"
            rows = torch.tensor(routers.difference[layer, index].astype(np.float32))
            tensors[f"{name}.weight"] = torch.stack((rows, torch.zeros_like(rows)))
            tensors[f"{name}.bias"] = torch.tensor([routers.bias[layer, index], 0.0])
    torch.save(tensors, tmp_path / "router.pth")
    arguments = ("generate", *model, *PROMPT, *TINY, "-n", 6)
    expected = call.json(*arguments, "--routers", folder / "routers", "--kv", "dense")
    found = call.json(*arguments, "--routers", tmp_path / "router.pth")
    assert found["tokens"] == expected["tokens"] and found["skip_mlp"] == expected["skip_mlp"] > 0
    assert found["kv_bytes_written"] == expected["kv_bytes_written"]
    del tensors["model.layers.1.router_mlp.weight_predictor.bias"]
    torch.save(tensors, tmp_path / "router.pth")
    line = call.bad(*arguments, "--routers", tmp_path / "router.pth")
    assert line.endswith("router.pth: missing keys: model.layers.1.router_mlp.weight_predictor.bias")


def test_skipgpt_lora_changes_the_weights(call, model, folder, tmp_path):
    name = "base_model.model.model.layers.0.block.mlp.down_proj"
    sizes, generator = load_model(folder / "model.gguf").config, torch.Generator().manual_seed(1)
    rows, cols = sizes.hidden, sizes.mlp
    lora = {f"{name}.lora_A.default.weight": torch.randn(4, cols, generator=generator),
            f"{name}.lora_B.default.weight": torch.randn(rows, 4, generator=generator)}
    torch.save(lora, tmp_path / "lora.pth")
    arguments = ("generate", *model, *PROMPT, *TINY, "-n", 6)
    assert call.json(*arguments, "--lora", tmp_path / "lora.pth")["tokens"] != call.json(*arguments)["tokens"]
    call.good("compile", *model, *TINY, "-o", tmp_path / "bundle")
    line = call.bad("generate", "-m", tmp_path / "bundle", *PROMPT, "--lora", tmp_path / "lora.pth")
    assert line.endswith("a bundle is made with its weights; give --lora to compile")
    del lora[f"{name}.lora_B.default.weight"]
    torch.save(lora, tmp_path / "lora.pth")
    assert "missing keys" in call.bad(*arguments, "--lora", tmp_path / "lora.pth")


def test_a_bundle_keeps_its_routers(call, model, folder, tmp_path):
    arguments = ("--routers", folder / "routers", "--kv", "dense")
    bundle = tmp_path / "routed.skpu"
    assert call.json("compile", *model, *TINY, "-o", bundle, *arguments)["kv"] == "dense"
    found, expected = (call.json("generate", *which, *PROMPT, "-n", 6) for which in (
        ("-m", bundle), (*model, *TINY, *arguments)))
    assert found["tokens"] == expected["tokens"] and found["skip_mlp"] == expected["skip_mlp"] > 0
    assert call.json("generate", "-m", bundle, *PROMPT, "-n", 2, "--force-skip", 1)["skip_mlp"] == 1
    assert "a bundle is made with its routers" in call.bad("generate", "-m", bundle, *PROMPT, "--kv", "reuse")
    assert "a bundle is made with its KV memory" in call.bad("generate", "-m", bundle, *PROMPT, "--buffer", 0)


def test_kv_formats(call, model, tmp_path):
    """Fewer bytes, other bits of the same text; what the compiler, a bundle and a board know of them."""
    arguments, bundle = ("generate", *model, *PROMPT, *TINY, "-n", 6), tmp_path / "small.skpu"
    found = {name: call.json(*arguments, "--kv-format", name) for name in ("fp16", "12", "8")}
    assert call.json(*arguments)["bytes_read"] == found["fp16"]["bytes_read"]
    assert found["8"]["bytes_read"] < found["12"]["bytes_read"] < found["fp16"]["bytes_read"]
    sizes = {}
    for name in found:
        summary = call.json("compile", *model, *TINY, "--kv-format", name, "-o", bundle)
        sizes[name] = summary["bytes"]["kv"]
        assert summary["kv_format"] == name
        assert call.json("generate", "-m", bundle, *PROMPT, "-n", 6)["tokens"] == found[name]["tokens"]
    assert sizes["8"] < sizes["12"] < sizes["fp16"]
    assert "KV format must be fp16, 12, 8, not 'fp8'" in call.bad(*arguments, "--kv-format", "fp8")
    assert ("configuration ulx3s has KV records in FP16 only, not in 8 bits; use KV format fp16, or configuration tiny "
            "or sim or sim16 or u280") in call.bad(*arguments, "--config", "ulx3s", "--kv-format", "8")
    assert "give --buffer, --kv-share and --kv-format to compile" in call.bad("generate", "-m", bundle, *PROMPT,
                                                                              "--kv-format", "8")


def test_sizes_of_kv_memory(call, model, tmp_path):
    arguments = ("generate", *model, *PROMPT, *TINY, "-n", 6, "--kv", "reuse", "--force-skip", 0.5, "--seed", 2)
    expected = call.json(*arguments)
    for sizes in (("--buffer", 0), ("--buffer", 512), ("--kv-share", 0.9)):
        found = call.json(*arguments, *sizes)
        assert found["tokens"] == expected["tokens"]
    assert call.json(*arguments, "--buffer", 0)["bytes_read"] > expected["bytes_read"]  # all of it by default
    assert "has 4096 bytes; ask for 0..4096, not 5000" in call.bad(*arguments, "--buffer", 5000)
    assert "must be 0..1, not 2" in call.bad(*arguments, "--kv-share", 2)
    assert "memory for KV records is full" in call.bad(*arguments[:-4], "--context", 8, "--kv-share", 0, "--json")
    assert "device functional has no memory timing to choose" in call.bad(*arguments, "--memory", "hbm")
    bundle = tmp_path / "small.skpu"
    full, less = (call.json("compile", *model, *TINY, "--kv", "reuse", "-o", bundle, *sizes)["bytes"]["kv"]
                  for sizes in ((), ("--kv-share", 0.75)))
    assert less == pytest.approx(0.75 * full, rel=0.01)


def test_compare_and_eval_with_routers(call, model, folder):
    routers = ("--routers", folder / "routers")
    report = call.json("compare", *model, *PROMPT, *TINY, "-n", 3, "--devices", "functional,functional", *routers)
    assert report["equal"]
    evaluation = ("eval", *model, "--tokens", folder / "tokens.npz", *TINY, "--limit", 2)
    report = call.json(*evaluation, *routers)
    assert report["kl"] < 0.01 and report["decision_agreement"] > 0.9 and 0 < report["skip_mlp"] < 1
    forced = call.json(*evaluation, "--force-skip", 0.3)
    assert forced["decision_agreement"] == 1 and forced["kl"] < 0.01
    assert call.json(*evaluation)["decision_agreement"] is None
    routed = call.json(*evaluation, *routers, "--device", "reference")  # against the model without routers
    assert routed["kl"] > 0.01 and routed["decision_agreement"] is None
    out, _ = call.good(*evaluation, *routers)
    assert "of the decisions are the reference's" in out


def test_compare_and_eval_count_what_skipping_saves(call, model, folder):
    commands = (("compare", *model, *PROMPT, *TINY, "-n", 4, "--devices", "functional,functional"),
                ("eval", *model, "--tokens", folder / "tokens.npz", *TINY, "--limit", 2))
    for command in commands:
        plain, nothing, half = (call.json(*command, *extra) for extra in (
            (), ("--force-skip", 0, "--kv", "reuse"), ("--force-skip", 0.5, "--kv", "reuse")))
        assert plain["skip_attention"] is None and (nothing["skip_attention"], nothing["skip_mlp"]) == (0, 0)
        assert half["skip_attention"] > 0.2 and half["skip_mlp"] > 0.2
        for name in ("kv_bytes_written", "weight_bytes_read"):
            assert half[name] < nothing[name] == plain[name]
            assert half["labels"][name] == "simulated"
    generated = call.json("generate", *model, *PROMPT, *TINY, "-n", 4, "--force-skip", 0.5)
    compared = call.json(*commands[0], "--force-skip", 0.5)
    assert compared["generated"] == generated["tokens"]
    for name in ("skip_attention", "skip_mlp", "kv_bytes_written"):  # but weights: compare reads the head for each row
        assert compared[name] == generated[name]
    assert call.json(*commands[1], "--device", "reference")["weight_bytes_read"] is None


def test_routes_are_drawn(call, model, tmp_path):
    arguments = ("routes", *model, *PROMPT, *TINY, "-n", 5, "--force-skip", 0.4)
    report = call.json(*arguments, "-o", tmp_path / "map.svg")
    ran = np.array(report["executed"])
    assert ran.shape == (2, 2, 7) and (report["layers"], report["tokens"]) == (2, 7)
    assert report["skip_attention"] == pytest.approx(1 - ran[:, 0].mean())
    np.testing.assert_allclose(report["skip_by_layer"], 1 - ran.mean(2))
    assert "<svg" in (tmp_path / "map.svg").read_text()
    out, _ = call.good(*arguments, "-o", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    lines = out.splitlines()
    cells = {(0, 0): "·", (1, 0): "▀", (0, 1): "▄", (1, 1): "█"}
    for layer in range(2):
        drawn = "".join(cells[tuple(pair)] for pair in ran[layer].T)
        assert lines[1 + layer].split()[:2] == [str(layer), drawn[:3] + "│" + drawn[3:]]
    assert "skipped" in lines[-1]


@pytest.mark.parametrize(("arguments", "message"), [
    (("--routers", "{}/foreign"), "these routers are for the model with hash 0000000000000000, but random-8 has"),
    (("--routers", "{}/two-layer"), "two-layer routers (hidden width 8) run in the reference only"),
    (("--routers", "{}/model.gguf"), "not a readable safetensors file"),
    (("--routers", "{}/none"), "no such router file or name; "),
    (("--routers", "smollm2:reus"), "did you mean smollm2:reuse?"),
    (("--kv", "sparse"), "KV mode must be dense or reuse, not 'sparse'"),
    (("--routers", "{}/routers", "--kv", "sparse"), "KV mode must be dense or reuse, not 'sparse'"),
    (("--force-skip", 1.5), "the forced skip rate must be 0..1, not 1.5"),
])
@pytest.mark.parametrize("command", [("generate",), ("compare", "--devices", "functional,functional"), ("routes",)],
                         ids=lambda command: command[0])
def test_bad_routers(call, model, folder, arguments, message, command):
    arguments = [str(argument).format(folder) for argument in arguments]
    assert message in call.bad(*command, *model, *PROMPT, *TINY, "-n", 2, *arguments)


def test_what_cannot_be_routed_or_drawn(call, model, folder, tmp_path):
    bundle = ("-m", folder / "text.skpu", "-p", "a")
    assert "the bundle is made without routers" in call.bad("generate", *bundle, "--force-skip", 0.5)
    assert "no routers decide here" in call.bad("routes", *bundle)
    line = call.bad("routes", *model, *PROMPT, *TINY, "--force-skip", 0.5, "-o", tmp_path / "map.gif")
    assert line.endswith("map.gif: a skip map is written as .png or .svg")


# mistakes

def damaged(folder, tmp_path, damage):
    path = tmp_path / "damaged"
    path.write_bytes(damage(bytearray((folder / damage.source).read_bytes())))
    return path


def damage_of(source):
    def mark(function):
        function.source = source
        return function
    return mark


@damage_of("model.gguf")
def cut(data):
    return data[: len(data) // 2]


@damage_of("model.gguf")
def magic(data):
    return b"GGUX" + data[4:]


@damage_of("model.gguf")
def architecture(data):
    return data.replace(b"llama", b"mamba")


@damage_of("text.skpu")
def flipped(data):
    data[len(data) // 2] ^= 1
    return data


@damage_of("text.skpu")
def cut_bundle(data):
    return data[:-100]


@pytest.mark.parametrize(("damage", "message"), [
    (cut, "damaged"), (magic, "not recognised; expected a GGUF file, a Hugging Face folder"),
    (architecture, "llama"), (flipped, "do not match their SHA-256"), (cut_bundle, "cut short or damaged")])
def test_damaged_models(call, folder, tmp_path, damage, message):
    line = call.bad("generate", "-m", damaged(folder, tmp_path, damage), *PROMPT)
    assert message in line


def test_nan_in_weights(call, tmp_path):
    model = random_model(1, kinds=("f32",), embedding="f32")
    model.tensors["layers.0.q"].values[3, 5] = np.nan
    write_gguf(model, tmp_path / "nan.gguf")
    assert "NaN" in call.bad("generate", "-m", tmp_path / "nan.gguf", *PROMPT)


def test_tensor_of_the_wrong_shape(call, tmp_path):
    model = random_model(1)
    model.tensors["layers.1.down"] = random_model(1, mlp=64).tensors["layers.1.down"]
    write_gguf(model, tmp_path / "shape.gguf")
    line = call.bad("generate", "-m", tmp_path / "shape.gguf", *PROMPT)
    assert "shape" in line and "[64, 96]" in line and "[64, 64]" in line


def test_model_too_large_for_the_configuration(call, tmp_path):
    write_gguf(random_model(1, heads=32, kv_heads=1, head_dim=8), tmp_path / "large.gguf")
    line = call.bad("compile", "-m", tmp_path / "large.gguf", *TINY, "-o", tmp_path / "out")
    assert "does not fit configuration tiny: acc_rows" in line
    assert "but is 16; use configuration sim or sim16 or u280" in line
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (("-p", "hi"), "has no tokenizer; give the prompt with --prompt-tokens"),
    (("--prompt-tokens", ""), "the prompt is empty"),
    (("--prompt-tokens", "1,x"), "must be numbers with commas, like 5,17,9, not '1,x'"),
    (("--prompt-tokens", "1,96"), "token ids must be 0..95, not 96"),
    (("--prompt-tokens", "1,2,3,4", "--context", 3), "4 tokens do not fit: the context holds 3 positions"),
    (("--prompt-tokens", "1", "--context", 129), "context must be 1..128 positions for model random-8, not 129"),
    (("--prompt-tokens", "1", "-n", 0), "count must be at least 1, not 0"),
    (("--prompt-tokens", "1", "--temp", -1), "temperature must be above 0, not -1.0"),
    (("--prompt-tokens", "1", "--top-p", 2), "top_p must be above 0 and at most 1"),
    (("--prompt-tokens", "1", "--device", "rtll"), "unknown device 'rtll', did you mean 'rtl'"),
])
@pytest.mark.parametrize("device", ["functional", "reference"])
def test_bad_requests(call, model, arguments, message, device):
    assert message in call.bad("generate", *model, *TINY, "--device", device, *arguments)


def test_unknown_configuration(call, model, tmp_path):
    for command in (("generate", *model, *PROMPT), ("verilog", "-o", tmp_path / "top.v")):
        assert "unknown configuration 'huge'; known: tiny" in call.bad(*command, "--config", "huge")


def test_missing_files(call, model, tmp_path):
    assert "no such file, folder or model name" in call.bad("generate", "-m", tmp_path / "none", *PROMPT)
    assert "cannot be read (No such file" in call.bad("disasm", tmp_path / "none")
    assert "cannot be read (No such file" in call.bad("eval", *model, "--tokens", tmp_path / "none")
    for command in (("compile", *model, *TINY), ("verilog", *TINY)):
        line = call.bad(*command, "-o", tmp_path / "none" / "out")
        assert line == f"{tmp_path / 'none' / 'out'}: No such file or directory"


def test_an_output_that_fails_leaves_the_old_file(call, model, tmp_path, monkeypatch):
    target = tmp_path / "model.skpu"
    target.write_text("precious")
    def fail(path, compiled):
        path.write_text("half")
        raise OSError(28, "No space left on device", str(target))
    monkeypatch.setattr("skipopu.host.bundle.save_bundle", fail)
    assert call.bad("compile", *model, *TINY, "-o", target) == f"{target}: No space left on device"
    assert target.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_bundles_stay_what_they_were_compiled_for(call, folder, tmp_path):
    bundle = ("-m", folder / "text.skpu")
    assert "made for configuration tiny" in call.bad("generate", *bundle, "-p", "a", "--config", "sim")
    assert "made for 24 positions, not 25" in call.bad("generate", *bundle, "-p", "a", "--context", 25)
    assert "the reference needs the model itself" in call.bad("generate", *bundle, "-p", "a", "--device", "reference")
    assert "eval needs the model itself" in call.bad("eval", *bundle, "--tokens", folder / "tokens.npz")
    assert "already compiled" in call.bad("compile", *bundle, "-o", tmp_path / "x")
    assert "the prompt is empty" in call.bad("generate", *bundle, "-p", "", "--chat")
    assert "not a compiled model" in call.bad("disasm", folder / "model.gguf")


def test_illegal_instruction_is_shown(call, folder, tmp_path):
    """A program that runs into an illegal opcode: the machine stops, the host shows the word."""
    compiled = compile_model(random_model(8, kinds=("q4_1",)), preset("tiny"))
    compiled.program.words[20] = 0xFE
    save_bundle(tmp_path / "illegal", compiled)
    assert "ILLEGAL_OPCODE (port 0) at instruction 20" in call.bad("generate", "-m", tmp_path / "illegal", *PROMPT)
    compiled.program.words[20] = encode("branch", imm=1 << 20)
    save_bundle(tmp_path / "away", compiled)
    assert "FETCH_RANGE (port 0) at instruction 20" in call.bad("generate", "-m", tmp_path / "away", *PROMPT)


@pytest.mark.parametrize(("names", "message"), [
    ("functional", "must name two of functional, rtl"), ("functional,reference", "equals no device bit for bit"),
    ("functional,fictional", "did you mean 'functional'")])
def test_bad_pairs_of_devices(call, model, names, message):
    assert message in call.bad("compare", *model, *PROMPT, "--devices", names)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"words": np.zeros((2, 3), int)}, "must hold an array named tokens, not words"),
    ({"tokens": np.zeros((2, 3))}, "must be whole numbers [sequences, length of 2 or more], not float64 [2, 3]"),
    ({"tokens": np.zeros(3, int)}, "not int64 [3]"),
    ({"tokens": np.full((1, 3), 96)}, "token ids must be 0..95, not 96"),
    ({"tokens": np.zeros((1, 200), int)}, "200 tokens do not fit"),
    ({"tokens": np.array([[{}, {}]])}, "not an .npz file of plain arrays")])
def test_bad_token_files(call, model, tmp_path, arrays, message):
    np.savez(tmp_path / "tokens.npz", **arrays)
    assert message in call.bad("eval", *model, "--tokens", tmp_path / "tokens.npz")


def test_token_file_that_is_none(call, model, folder):
    assert "not an .npz file" in call.bad("eval", *model, "--tokens", folder / "model.gguf")
    assert "limit must be at least 1" in call.bad("eval", *model, "--tokens", folder / "tokens.npz", "--limit", 0)


@pytest.mark.parametrize("arguments", [
    ("generate", "-m", "x"), ("generate", "-m", "x", "-p", "a", "--prompt-tokens", "1"), ("generate", "-p", "a"),
    ("compile", "-m", "x"), ("nonsense",), ("generate", "-m", "x", "-p", "a", "-n", "many"),
    ("generate", "-m", "x", "-p", "a", "--seed", "-1")], ids=str)
def test_wrong_usage_exits_with_2(call, arguments):
    code, out, err = call(*arguments)
    assert code == 2 and out == "" and "Traceback" not in err

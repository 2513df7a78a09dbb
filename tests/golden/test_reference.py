"""The float reference against Hugging Face transformers on the same weights, and against itself in other orders."""

import numpy as np
import pytest
import torch
from skipopu.golden.random_model import random_model
from skipopu.golden.reference import ReferenceModel, rms_norm, rotate_pairs
from skipopu.host.hf_import import interleave_rows, load_hf
from skipopu.host.load import list_models, load_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

# a conversation that SmolLM2 wrote: 80 tokens
SMOLLM2_TOKENS = [
    1, 4093, 198, 36971, 638, 5530, 416, 3898, 929, 767, 260, 3049, 1029, 4834, 1708, 282, 6367, 30, 2, 198, 1, 520,
    9531, 198, 16078, 366, 416, 3898, 5711, 282, 929, 767, 260, 3049, 1029, 4834, 1708, 282, 6367, 411, 1015, 4378,
    3963, 702, 18479, 284, 6416, 5290, 288, 13240, 6367, 7037, 284, 7037, 1734, 30, 1068, 2648, 28, 3243, 457, 2452,
    18479, 338, 416, 7236, 281, 5532, 4978, 28, 4345, 3496, 3499, 284, 2474, 4890, 335, 253, 2956, 4030]


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def test_smollm2_gives_the_logits_of_transformers():
    path = next(model.path for model in list_models() if model.name == "smollm2")
    oracle = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    with torch.inference_mode():
        expected = oracle(torch.tensor([SMOLLM2_TOKENS])).logits[0]
    got = ReferenceModel(load_model("smollm2")).forward(SMOLLM2_TOKENS)
    assert got.shape == (80, 49152)
    assert relative_error(got, expected) < 1e-3
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def hf_oracle(seed, **geometry):
    """A random transformers Llama whose weights spread enough for attention and logits to matter."""
    defaults = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": False}
    torch.manual_seed(seed)
    oracle = LlamaForCausalLM(LlamaConfig(**(defaults | geometry))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in oracle.parameters():
            fresh = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * fresh if parameter.ndim == 1 else 1.5 * fresh / parameter.shape[1] ** 0.5)
    return oracle


def put_weights(oracle, model):
    """Give ``oracle`` the dequantised weights of ``model``, in Hugging Face's row order."""
    config, names = model.config, {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
                                   "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
                                   "down": "mlp.down_proj"}
    with torch.no_grad():
        oracle.get_input_embeddings().weight.copy_(torch.tensor(model.tensors["embedding"].dequantise()))
        oracle.get_output_embeddings().weight.copy_(torch.tensor(model.head.dequantise()))
        for index, layer in enumerate(oracle.model.layers):
            for ours, theirs in names.items():
                values = model.layer(index)[ours].dequantise()
                if ours in "qk":
                    order = interleave_rows(len(values) // config.head_dim, config.head_dim)
                    values = values[np.argsort(order)]
                layer.get_submodule(theirs).weight.copy_(torch.tensor(values))


@pytest.mark.parametrize("geometry", [
    pytest.param({"num_key_value_heads": 4, "head_dim": 8}, id="one head per kv head"),
    pytest.param({"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}, id="tied"),
    pytest.param({"num_key_value_heads": 1, "head_dim": 64}, id="one kv head"),
    pytest.param({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 96, "tie_word_embeddings": True},
                 id="4 heads of 96 per kv head"),
    pytest.param({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-2},
                 id="heads of 128, large eps"),
    pytest.param({"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": LLAMA3}, id="llama3 scaling"),
])
@pytest.mark.parametrize("kinds", [("f32", "f32"), ("q4_1", "q8_0")], ids=["unquantised", "quantised"])
def test_random_llamas_give_the_logits_of_transformers(tmp_path, geometry, kinds):
    oracle = hf_oracle(11, **geometry)
    oracle.save_pretrained(tmp_path)
    model = load_hf(tmp_path, linear=kinds[0], embedding=kinds[1])
    if kinds[0] != "f32":
        put_weights(oracle, model)
    tokens = torch.randint(0, 120, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = oracle(tokens).logits, ReferenceModel(model).logits(tokens)
    assert expected.std() > 1  # the comparison has something to compare
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [12]], ids=["singly", "mixed", "at once"])
def test_steps_equal_the_whole_sequence(seed, pieces):
    reference = ReferenceModel(random_model(seed))
    tokens = torch.randint(0, 96, (12,), generator=torch.Generator().manual_seed(seed))
    expected = reference.forward(tokens)
    for _ in range(2):  # the second pass shows that reset forgets the first
        reference.reset()
        got = torch.cat([reference.step(piece) for piece in tokens.split(pieces)])
        assert relative_error(got, expected) < 1e-5


def test_a_batch_is_its_sequences():
    reference = ReferenceModel(random_model(2))
    tokens = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    for row, logits in zip(tokens, reference.logits(tokens)):
        assert relative_error(logits, reference.forward(row)) < 1e-5


def test_later_tokens_do_not_change_earlier_logits():
    reference = ReferenceModel(random_model(3))
    tokens = torch.arange(16)
    changed = tokens.clone()
    changed[10] = 90
    before, after = reference.forward(tokens), reference.forward(changed)
    assert relative_error(after[:10], before[:10]) < 1e-6
    assert relative_error(after[10:], before[10:]) > 1e-2


def test_float64_agrees_with_float32():
    model, tokens = random_model(4), torch.arange(20)
    exact = ReferenceModel(model, dtype=torch.float64).forward(tokens)
    assert exact.dtype == torch.float64
    assert relative_error(ReferenceModel(model).forward(tokens).double(), exact) < 1e-5


def test_rms_norm_values():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    got = rms_norm(x, torch.tensor([1.0, 2.0]), 0.0 + 1e-12)
    assert torch.allclose(got, torch.tensor([[3.0, -8.0], [0.0, 0.0]]) / 12.5 ** 0.5)


def test_rotation_turns_adjacent_pairs():
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4)
    quarter = torch.tensor([[torch.pi / 2, torch.pi]])
    assert torch.allclose(rotate_pairs(x, quarter).flatten(), torch.tensor([0.0, 1.0, 0.0, -2.0]), atol=1e-6)
    assert torch.equal(rotate_pairs(x, torch.zeros(1, 2)), x)

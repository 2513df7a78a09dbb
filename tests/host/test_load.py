"""Finding a model by name, file or folder."""

import dataclasses

import pytest
from skipopu.golden.random_model import random_model, write_gguf
from skipopu.host import load
from skipopu.host.errors import ModelError
from skipopu.host.load import Loader, list_models, load_model, register_loader


@pytest.fixture
def loaders(monkeypatch):
    monkeypatch.setattr(load, "LOADERS", list(load.LOADERS))


def test_smollm2_is_found_in_its_wheel():
    model = load_model("smollm2")
    config = model.config
    assert (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.mlp, config.vocab, config.context, config.tied_head) == (1536, 49152, 8192, True)
    assert (config.bos_id, config.eos_ids, config.rope_theta) == (1, (2,), 100000.0)
    assert {tensor.kind for name, tensor in model.tensors.items() if name.startswith("layers")} == {"q4_1", "f32"}
    assert model.head.kind == "q8_0"
    assert model.tokenizer.vocab == 49152
    assert len(model.identity) == 64


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokenizer, model = load_model("smollm2").tokenizer, random_model(0)
    with pytest.raises(ModelError, match="the tokenizer has 49152 tokens, but the embedding only 96 rows"):
        dataclasses.replace(model, tokenizer=tokenizer)


def test_a_file_is_known_by_its_content(tmp_path):
    write_gguf(random_model(0), tmp_path / "named.anything")
    assert load_model(tmp_path / "named.anything").config.name == "random-0"


def test_a_registered_format_is_loaded(tmp_path, loaders):
    path = tmp_path / "m.bundle"
    path.write_bytes(b"BUNDLE")
    with pytest.raises(ModelError, match="not recognised; expected a GGUF file, a Hugging Face folder$"):
        load_model(path)
    model = random_model(1)
    for answer in None, model:  # registering a name again replaces it
        register_loader(Loader("bundle", lambda path: path.suffix == ".bundle", lambda path, answer=answer: answer))
    assert load_model(path) is model
    assert [loader.name for loader in load.LOADERS].count("bundle") == 1


def test_a_format_may_quantise_itself(tmp_path, loaders):
    path = tmp_path / "m.floats"
    path.write_bytes(b"FLOATS")
    register_loader(Loader("floats", lambda path: path.suffix == ".floats",
                           lambda path, linear="q4_1": random_model(1, kinds=(linear,)), quantises=True))
    assert load_model(path, "q4_g64").layer(0)["q"].kind == "q4_g64" and load_model(path).layer(0)["q"].kind == "q4_1"
    write_gguf(random_model(0), tmp_path / "m.gguf")
    assert load_model(tmp_path / "m.gguf", "q4_g64").layer(0)["q"].kind == "q4_g64"


@pytest.mark.parametrize(("spec", "message"), [
    ("smolm2", "smolm2: no such file, folder or model name; did you mean smollm2?"),
    ("nothing/like/it", "nothing/like/it: no such file, folder or model name; models with a name: smollm2, story"),
])
def test_unknown_names_are_refused(spec, message):
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    assert str(caught.value) == message


def test_an_absent_wheel_names_its_install_command(monkeypatch):
    monkeypatch.setattr(load, "_wheel_file", lambda distribution, suffix: None)
    assert list_models()[0].path is None
    with pytest.raises(ModelError, match="smollm2 is not installed: pip install"):
        load_model("smollm2")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="not recognised"):
        load_model(tmp_path)

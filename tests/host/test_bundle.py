"""Bundles read back whole, and every kind of damage is refused with a clear line."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.bundle import FORMAT_VERSION, MAGIC, load_bundle, save_bundle
from skipopu.host.chat import ChatTemplate
from skipopu.host.compiler import compile_model
from skipopu.host.errors import BundleError
from skipopu.host.tokenizer import Tokenizer
from skipopu.hw.config import preset
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers


@pytest.fixture(scope="module")
def compiled():
    vocab = {character: index for index, character in enumerate("abcdefgh")}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend, byte_level=True, strip_space=False, bos_id=8, add_bos=True)
    model = random_model(2, bos_id=8, eos_ids=(3, 4))
    whole = compile_model(model, preset("tiny"))
    return dataclasses.replace(whole, tokenizer=tokenizer, chat=ChatTemplate("{{ bos_token }}hi", bos="<s>", eos="b"))


@pytest.fixture
def path(compiled, tmp_path):
    save_bundle(tmp_path / "model.skpu", compiled)
    return tmp_path / "model.skpu"


def test_everything_comes_back(compiled, path):
    got = load_bundle(path, preset("tiny"))
    assert got.config == compiled.config and got.map == compiled.map and got.notes == compiled.notes
    assert got.program.words == compiled.program.words and got.program.notes == compiled.program.notes
    np.testing.assert_array_equal(got.image, compiled.image)
    assert not got.image.flags.writeable
    assert got.tokenizer.encode("abba") == compiled.tokenizer.encode("abba") == [8, 0, 1, 1, 0]
    assert got.tokenizer.decode([0, 8, 7]) == "ah"
    assert got.chat.render([]) == "<s>hi"


def test_model_without_tokenizer(tmp_path):
    bare = compile_model(random_model(1), preset("tiny"))
    save_bundle(tmp_path / "bare", bare)
    got = load_bundle(tmp_path / "bare")
    assert got.tokenizer is None and got.chat is None


def test_same_compilation_gives_the_same_bytes(compiled, path, tmp_path):
    save_bundle(tmp_path / "again", compiled)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


DAMAGE = {
    "another file": (lambda data: b"GGUF" + data[4:], f"not a compiled model: it begins with b'GGUF', not {MAGIC!r}"),
    "empty": (lambda data: b"", "not a compiled model"),
    "header cut": (lambda data: data[:40], "cut short: 40 bytes"),
    "cut": (lambda data: data[:-1], "must have .* bytes"),
    "longer": (lambda data: data + b"x", "must have .* bytes"),
    "version": (lambda data: data[:4] + b"\x63" + data[5:], f"format version 99, expected {FORMAT_VERSION}"),
    "description size": (lambda data: data[:8] + b"\xff" * 7 + data[15:], "damaged"),
    "flipped in the description": (lambda data: data[:70] + bytes([data[70] ^ 1]) + data[71:], "SHA-256"),
    "flipped at the end": (lambda data: data[:-1] + bytes([data[-1] ^ 128]), "SHA-256"),
    "flipped in the middle": (lambda data: data[:50000] + bytes([data[50000] ^ 4]) + data[50001:], "SHA-256"),
}
# path to an entry of the description, and what it becomes
EDITS = {
    "impossible configuration": (("config", "lanes"), 3, "malformed .*lanes"),
    "changed configuration": (("config", "cache_words"), 32, "another version"),
    "other ISA": (("isa_version",), 9, "made by another version"),
    "section too large": (("sections", "image"), 1 << 40, "does not fit"),
    "section not a number": (("sections", "image"), "x", "does not fit"),
    "other image size": (("map", "image"), 2, "the image must have"),
    "region outside": (("map", "regions", "embedding"), [-9, 1], "lies outside"),
    "no room for the program": (("map", "regions", "program"), [0, 1], "the program of .* does not fit"),
    "unknown field": (("map", "regionz"), {}, "malformed .*regionz"),
    "no origins": (("origins",), [], "malformed"),
}


@pytest.mark.parametrize(("entry", "value", "message"), EDITS.values(), ids=list(EDITS))
def test_inconsistent_description_is_refused(path, entry, value, message):
    data = path.read_bytes()
    size = int.from_bytes(data[8:16], "little")
    about = json.loads(data[64 : 64 + size])
    place = about
    for key in entry[:-1]:
        place = place[key]
    place[entry[-1]] = value
    text = json.dumps(about, separators=(",", ":")).encode().ljust(size)
    body = text + data[64 + size :]
    path.write_bytes(data[:24] + hashlib.sha256(body).digest() + data[56:64] + body)
    with pytest.raises(BundleError, match=f"^{path}: .*{message}"):
        load_bundle(path)


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_refused(path, damage, message):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=f"^{path}: .*(?:{message})"):
        load_bundle(path)


def test_every_flipped_byte_of_the_header_is_noticed(path):
    data = path.read_bytes()
    for at in range(56):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BundleError):
            load_bundle(path)


def test_other_configuration_is_refused(path):
    with pytest.raises(BundleError, match="made for configuration tiny .* not sim .*compile the model for sim"):
        load_bundle(path, preset("sim"))


def test_missing_file(tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(tmp_path / "none")

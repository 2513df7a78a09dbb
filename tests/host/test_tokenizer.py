"""Tokenizers: SmolLM2's against transformers, SentencePiece's against its definition, and decoding byte by byte."""

import json

import numpy as np
import pytest
from skipopu.host.errors import ModelError
from skipopu.host.gguf_file import GgufFile
from skipopu.host.load import list_models, load_model
from skipopu.host.tokenizer import SPACE, Tokenizer
from transformers import AutoTokenizer

TEXTS = [
    "", " ", "Hello", "Hello, world!", "  two  spaces\tand\n\nlines  ", "It's we'll I'm don't", "a1b22 333,4444.5",
    "Grüße aus Köln",
    "日本語のテキスト", "emoji 😀👩‍👩‍👧 end", "naïve café Ω ≈ ç", "русский текст", "עברית عربي", "\u0000\u001f",
    "<|im_start|>user\nHi<|im_end|>\n", "def f(x):\n    return x ** 2  # square", "x" * 300, "\ud7ff\ue000\uffff",
]


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2")


@pytest.fixture(scope="module")
def oracle():
    path = next(model.path for model in list_models() if model.name == "smollm2")
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokens_and_text_are_those_of_transformers(smollm2, oracle, text):
    tokens = smollm2.tokenizer.encode(text)
    assert tokens == oracle.encode(text)
    for skip in True, False:
        assert smollm2.tokenizer.decode(tokens, skip_special=skip) == oracle.decode(
            tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert smollm2.tokenizer.decode(tokens, skip_special=False) == text


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", [
    [("user", "Hi")], [("system", "Be brief."), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello!"), ("user", "ünïcödé\n\n")]])
def test_smollm2_chat_is_that_of_transformers(smollm2, oracle, messages, generate):
    messages = [{"role": role, "content": content} for role, content in messages]
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    assert smollm2.chat.render(messages, add_generation_prompt=generate) == expected


def test_every_smollm2_token_decodes_as_in_transformers(smollm2, oracle):
    for token in np.random.default_rng(0).choice(49152, 2000, replace=False).tolist():
        assert smollm2.tokenizer.decode([token], skip_special=False) == oracle.decode([token]), token


def test_digits_stand_alone(smollm2):
    pieces = [smollm2.tokenizer.piece(token) for token in smollm2.tokenizer.encode("in 2024")]
    assert pieces[-4:] == ["2", "0", "2", "4"]


def test_markers_in_a_strangers_text_stay_text(smollm2):
    tokenizer = smollm2.tokenizer
    marker = tokenizer.encode("<|im_end|>")
    plain = tokenizer.encode("<|im_end|>", special=False)
    assert marker == [2] and 2 in tokenizer.special
    assert not tokenizer.special & set(plain)
    assert tokenizer.decode(plain) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [2]  # one call's choice does not stick
    assert tokenizer.decode([2]) == ""


def test_beginning_of_sequence_is_a_choice(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.encode("Hi", bos=True) == [1, *tokenizer.encode("Hi")]
    assert tokenizer.encode("<|im_start|>Hi", bos=True).count(1) == 1
    assert tokenizer.encode("", bos=True) == [1]


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_streamed_text_equals_decoded_text(smollm2, text):
    tokens = smollm2.tokenizer.encode(text)
    stream = smollm2.tokenizer.stream(skip_special=False)
    parts = [stream.feed(token) for token in tokens]
    assert "\ufffd" not in "".join(parts)  # never half a character
    assert "".join(parts) + stream.finish() == text


def test_text_appears_with_its_last_byte(smollm2):
    tokens = smollm2.tokenizer.encode("👩", special=False)
    assert len(tokens) > 1
    stream = smollm2.tokenizer.stream()
    assert [stream.feed(token) for token in tokens] == [""] * (len(tokens) - 1) + ["👩"]
    stream.feed(tokens[0])
    assert stream.finish() == "\ufffd"


def test_bytes_that_are_not_utf8_do_not_hold_the_stream_up(smollm2):
    first = smollm2.tokenizer.encode("👩", special=False)[0]
    hello = smollm2.tokenizer.encode("Hello")
    stream = smollm2.tokenizer.stream()
    assert "".join(stream.feed(token) for token in [first, *hello]) == "\ufffdHello"
    assert smollm2.tokenizer.decode([first, *hello]) == "\ufffdHello"


def test_tokens_beyond_the_vocabulary_are_silent(smollm2):
    assert smollm2.tokenizer.decode([60000, -1]) == ""
    assert smollm2.tokenizer.piece(None) == smollm2.tokenizer.piece(60000) == ""


def test_a_lone_surrogate_is_refused(smollm2):
    with pytest.raises(ModelError, match="lone surrogate"):
        smollm2.tokenizer.encode("\ud800")


@pytest.mark.parametrize("text", TEXTS)
def test_a_folder_gives_the_same_tokens(smollm2, tmp_path, text):
    smollm2.tokenizer.save(tmp_path / "tokenizer.json")
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|im_start|>"}}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.vocab) == (1, False, 49152)
    tokens = tokenizer.encode(text)
    assert tokens == smollm2.tokenizer.encode(text)
    assert tokenizer.decode(tokens, skip_special=False) == text


def sentencepiece_metadata(seed=0):
    """A SentencePiece vocabulary over a, b, c and the space: markers, all bytes, letters, random longer pieces."""
    rng = np.random.default_rng(seed)
    letters = ["a", "b", "c", SPACE]
    longer = sorted({"".join(rng.choice(letters, rng.integers(2, 5))) for _ in range(60)})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *longer]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(longer))]
    scores = [0.0] * 259 + (-rng.permutation(len(letters) + len(longer))).astype(float).tolist()
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1}


def sentencepiece_merge(metadata, text):
    """The definition: while neighbours join to a known piece, join the pair of the best score, leftmost first."""
    score = dict(zip(metadata["tokenizer.ggml.tokens"][259:], metadata["tokenizer.ggml.scores"][259:]))
    pieces = list((" " + text).replace(" ", SPACE))
    while joins := [(-score[a + b], at) for at, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in score]:
        at = min(joins)[1]
        pieces[at:at + 2] = [pieces[at] + pieces[at + 1]]
    index = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    return [number for piece in pieces
            for number in ([index[piece]] if piece in index else [3 + byte for byte in piece.encode()])]


@pytest.mark.parametrize("seed", range(5))
def test_sentencepiece_merges_by_score(seed):
    metadata = sentencepiece_metadata(seed)
    tokenizer, rng = Tokenizer.from_gguf(metadata), np.random.default_rng(seed)
    for _ in range(40):
        text = "".join(rng.choice(list("abc ü"), rng.integers(1, 16)))
        tokens = tokenizer.encode(text, bos=False)
        assert tokens == sentencepiece_merge(metadata, text), text
        assert tokenizer.decode(tokens) == text


def test_sentencepiece_starts_with_its_marker_and_streams_bytes():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    assert tokenizer.encode("a")[0] == 1
    tokens = tokenizer.encode("ü", bos=False)
    stream = tokenizer.stream()
    assert [stream.feed(token) for token in tokens] == [" ", "", "ü"]
    plain = Tokenizer.from_gguf(sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False,
                                                            "tokenizer.ggml.add_bos_token": False})
    assert plain.decode(plain.encode(" a")) == " a" and plain.encode("ü") == [3 + 0xC3, 3 + 0xBC]


def test_a_sentencepiece_folder_keeps_its_space_and_marker(tmp_path):
    original = Tokenizer.from_gguf(sentencepiece_metadata())
    original.save(tmp_path / "tokenizer.json")
    description = json.loads(tmp_path.joinpath("tokenizer.json").read_text())
    description["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    tmp_path.joinpath("tokenizer.json").write_text(json.dumps(description))
    tmp_path.joinpath("tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, True)
    for text in "a b", "cab ü  a":
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama3_split_keeps_three_digits_together():
    letters = [chr(33 + index) for index in range(94)] + ["Ġ"]
    merges = ["1 2", "12 3", "123 4", "Ġ a", "a b"]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": merges,
                "tokenizer.ggml.tokens": [*letters, "12", "123", "1234", "Ġa", "ab", "Ġab"]}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert [tokenizer.piece(token) for token in tokenizer.encode("1234 ab")] == ["123", "4", "Ġab"]


@pytest.mark.parametrize(("change", "message"), [
    ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported; supported: 'gpt2', 'llama'"),
    ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is not supported; supported: gpt-2, smollm, llama-bpe"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens must be a list of strings"),
    ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of strings"),
    ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges must be a list of strings"),
    ({"tokenizer.ggml.merges": ["qqqq zzzz"]}, "merges do not fit its tokens"),
    ({"tokenizer.ggml.token_type": [1]}, "token_type must list 49152 types, one per token"),
    ({"tokenizer.ggml.model": "llama"}, "scores must list 49152 scores, one per token"),
    ({"tokenizer.ggml.bos_token_id": "one"}, "bos_token_id must be a token from 0 to 49151, not 'one'"),
])
def test_unusable_metadata_is_refused(change, message):
    path = next(model.path for model in list_models() if model.name == "smollm2")
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(GgufFile(path).metadata | change)


def test_unusable_tokenizer_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match="tokenizer.json: not a usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
    word_level = {"version": "1.0", "added_tokens": [],
                  "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    tmp_path.joinpath("tokenizer.json").write_text(json.dumps(word_level))
    with pytest.raises(ModelError, match="only byte-level and byte-fallback tokenizers are supported, not WordLevel"):
        Tokenizer.from_folder(tmp_path)

"""Stories and their tokens: told alike from a seed, true to themselves, and turned into sequences without loss."""

import math

import numpy as np
import pytest
from skipopu.host.errors import ModelError, RequestError
from skipopu.host.tuning.stories import Teller, can_tell, story, tell
from skipopu.host.tuning.words import END, pack, read_stories, word_tokenizer

STORIES = [text for text, _ in tell(200, 3)]


def test_a_seed_tells_the_same_stories():
    assert [text for text, _ in tell(5, 3)] == STORIES[:5]
    assert [text for text, _ in tell(5, 4)] != STORIES[:5]


def test_information_is_the_sum_of_the_choices():
    class Counting(Teller):
        odds = 1

        def pick(self, *options):
            self.odds *= len(options)
            return super().pick(*options)

    teller = Counting(1)
    story(teller)
    assert teller.nats == pytest.approx(math.log(teller.odds))


def test_every_story_is_one_that_the_grammar_tells():
    assert all(can_tell(text) for text in STORIES)


@pytest.mark.parametrize("change", [
    lambda text: text + " The end.", lambda text: text.rpartition(". ")[0], lambda text: text.replace("little", "big"),
    lambda text: text.replace("the", "a", 1), lambda text: text[:-1], lambda text: ""])
def test_a_changed_story_is_not(change):
    assert not any(can_tell(change(text)) for text in STORIES[:20])


def test_a_story_untrue_to_itself_is_not():
    text = next(text for text in STORIES if "Sam" in text and text.count("Sam") > 2)
    first = text.index("Sam") + 3
    assert not can_tell(text[:first] + text[first:].replace("Sam", "Ben", 1))


def test_each_word_is_a_token_and_comes_back():
    tokenizer, metadata = word_tokenizer(STORIES, 256)
    assert tokenizer.vocab == len(metadata["tokenizer.ggml.tokens"]) and tokenizer.vocab % 8 == 0
    for text in STORIES:
        tokens = tokenizer.encode(text)
        assert tokens[0] == END and tokenizer.decode(tokens) == text
        assert len(tokens) <= 1 + len(text.split()) + sum(map(text.count, '.!",'))


@pytest.mark.parametrize("text, word", [("Tom saw a dragon.", "' dragon'"), ("Über", "'Über'"), ("tom", "'tom'")])
def test_unknown_words_are_refused_by_name(text, word):
    tokenizer, _ = word_tokenizer(STORIES, 256)
    with pytest.raises(ModelError, match=f"^the model has no token for {word}; its vocabulary is 1.. words"):
        tokenizer.encode(text)


def test_sequences_begin_with_a_story_and_go_on_with_the_next():
    tokenizer, _ = word_tokenizer(STORIES, 256)
    rows = pack(STORIES, tokenizer, 110)
    assert rows.shape == (200, 110)
    for index, row in enumerate(rows):
        ends = np.flatnonzero(row == END)
        assert ends[0] == 0 and tokenizer.decode(row[1:ends[1]].tolist()) == STORIES[index]
        rest = tokenizer.decode(row[ends[1] + 1:].tolist())
        assert STORIES[(index + 1) % 200].startswith(rest)


def test_impossible_texts_are_refused(tmp_path):
    tokenizer, _ = word_tokenizer(STORIES, 256)
    with pytest.raises(RequestError, match=r"story \d+ has 1?\d\d tokens with its marks, more than the context of 50"):
        pack(STORIES, tokenizer, 50)
    with pytest.raises(RequestError, match=r"\d+ different words and marks, which make 1\d\d tokens, more than 20; "):
        word_tokenizer(STORIES, 20)
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="empty: holds no text; one story a line is expected"):
        read_stories(tmp_path / "empty")
    with pytest.raises(RequestError, match="bytes: must be UTF-8 text, one story a line"):
        read_stories(tmp_path / "bytes")

"""Qwen's tokenizer: the recorded encodings, tiktoken's rule on random text, and images written as bytes."""

from __future__ import annotations

import json
import random
import unicodedata
from itertools import pairwise

import pytest
import regex
import torch
from transformers import PreTrainedTokenizerFast

import tiny
from peft_mllm.data.encode import IGNORED
from peft_mllm.errors import DataError
from peft_mllm.models.qwen_vl.chatml import SYSTEM, captioned, encode
from peft_mllm.models.qwen_vl.tokenizer import PATTERN, SPECIALS, QWenTokenizer, read_ranks

GOLD = "qwen_vl_tokenizer_gold.json"


@pytest.fixture(scope="module")
def folder(cases):
    return cases / "qwen_vl_chat"


@pytest.fixture(scope="module")
def gold(folder):
    return json.loads((folder / GOLD).read_text())


@pytest.fixture(scope="module")
def ranks(folder):
    return read_ranks(folder / "qwen.tiktoken")


@pytest.fixture(scope="module")
def qwen(folder):
    return QWenTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer of single bytes, and of `ab`, `ba` and `aba`."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return QWenTokenizer.of_ranks(ranks | {b"ab": 256, b"ba": 257, b"aba": 258})


# Ids


def test_the_recorded_encodings(qwen, gold):
    for each in gold["encode"]:
        assert qwen(each["text"])["input_ids"] == each["ids"]
        assert qwen.encode(each["text"]) == each["ids"]
        assert qwen.encode_content(each["text"]) == each["ids"]
        assert qwen.decode(each["ids"]) == unicodedata.normalize("NFC", each["text"])


def test_the_special_tokens(qwen, folder):
    recorded = json.loads((folder / "special_tokens.json").read_text())
    assert {name: qwen.convert_tokens_to_ids(name) for name in SPECIALS} == recorded["special_tokens"]
    assert len(qwen) == recorded["n_vocab"]
    assert recorded["pat_str"] == PATTERN
    assert (qwen.eos_token_id, qwen.pad_token_id, qwen.bos_token_id, qwen.unk_token_id) == (151643, 151643, None, None)
    assert qwen.model_max_length == 8192


def by_tiktokens_rule(text, ranks):
    """Of the neighbours whose join has the lowest rank, the leftmost are joined, until none can be."""
    ids = []
    for piece in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while joins := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, i = min(joins)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def random_texts(count, ranks):
    draw = random.Random(0)
    words = [token.decode(errors="ignore") for token in draw.sample(sorted(ranks), 4000)]
    alphabets = ["ab", " \n\t\r=-*.", "etaoinshrdlu ", "'sStTrReEvVmMlLdD \u017f\u212a٣ⅫÅe\u0301", "0123456789,. "]
    blocks = [(32, 127), (0xA0, 0x3000), (0x3000, 0xD7FF), (0x4E00, 0x9FFF), (0xE000, 0x20000), (0, 32)]
    for i in range(count):
        if i % 3 == 0:
            yield "".join(draw.choice(draw.choice(alphabets[:1] + alphabets)) for _ in range(draw.randrange(1, 30)))
        elif i % 3 == 1:
            yield "".join(chr(draw.randrange(*draw.choice(blocks))) for _ in range(draw.randrange(1, 20)))
        else:
            word = draw.choice(words)
            yield "".join(draw.choice([word, draw.choice(words)]) for _ in range(draw.randrange(1, 8)))


def test_random_texts_are_encoded_by_tiktokens_rule(qwen, ranks):
    for text in random_texts(3000, ranks):
        assert qwen.encode_text(text) == by_tiktokens_rule(text, ranks), repr(text)


def test_a_token_made_in_two_ways_is_joined_from_the_left(bytewise):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"ba": 257, b"aba": 258}
    for text in ("aba", "baab", "ababa", "abaaba", "babab", "aabab"):
        assert bytewise.encode_text(text) == by_tiktokens_rule(text, ranks)


def test_offsets_cover_the_text(qwen):
    text = " I've 3 apples, 你好\n\n<|im_start|>user"
    encoded = qwen(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert "".join(pieces) == text
    assert pieces[:3] == [" I", "'ve", " "]
    assert pieces[-2:] == ["<|im_start|>", "user"]


def test_saved_it_is_the_same(bytewise, gold, tmp_path):
    bytewise.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    again = QWenTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == bytewise.chat_template
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)  # for those who have transformers alone
    for text in [each["text"] for each in gold["encode"]] + ["<|im_start|>abaab<|im_end|>"]:
        assert again(text)["input_ids"] == bytewise(text)["input_ids"]
        if "<img>" not in text:
            assert plain(text)["input_ids"] == bytewise(text)["input_ids"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("YQ== 0\nYg== 2\n", "from 0 on"), ("YQ== 0\nYg=\n", ":2:"), ("YQ== x\n", ":1:"), ("#!? 0\n", ":1:")],
)
def test_a_damaged_file_of_ranks_is_refused(tmp_path, content, said):
    (tmp_path / "qwen.tiktoken").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_ranks(tmp_path / "qwen.tiktoken")


# What users write


def test_in_a_users_text_only_boxes_are_special(bytewise):
    text = "<|im_end|><ref>a</ref><|endoftext|></img>"
    ids = bytewise.encode_text(text, boxes=True)
    names = bytewise.convert_ids_to_tokens([token for token in ids if token > 258])
    assert names == ["<ref>", "</ref>"]
    assert bytewise.decode(ids) == text
    assert all(token <= 258 for token in bytewise.encode_text(text))
    assert bytewise.im_end_id in bytewise(text)["input_ids"]  # what the tokenizer itself is given is trusted
    content = bytewise.encode_content("<|im_end|><img>x</img>")
    assert bytewise.im_end_id not in content
    assert bytewise.image_start_id in content


# Images


def test_a_path_is_written_as_bytes_and_read_again(bytewise):
    for path in ("", "a.png", "图.jpeg", "x" * 255):
        span = bytewise.image_span(path)
        assert len(span) == 258
        assert bytes(span[1 : 1 + len(path.encode())]).decode() == path
        assert set(span[1 + len(path.encode()) : -1]) <= {bytewise.image_pad_id}
        assert bytewise.image_paths([1, *span, 2, *span]) == [path, path]
        assert bytewise.decode([*span, 10]) == f"<img>{path}</img>\n"
        assert bytewise(f"a<img>{path}</img>\n")["input_ids"] == [97, *span, 10]
    assert bytewise.decode(bytewise.image_span("a.png"), skip_special_tokens=True) == "a.png"


def test_what_is_no_image_is_refused(bytewise):
    with pytest.raises(ValueError, match="257 bytes"):
        bytewise("<img>" + "x" * 257 + "</img>")
    for unclosed in ("<img>", "a<img>b</img><img>c"):
        with pytest.raises(ValueError, match="no </img>"):
            bytewise(unclosed)
        with pytest.raises(ValueError, match="no </img>"):
            bytewise.encode_content(unclosed)
    start, end, pad = bytewise.image_start_id, bytewise.image_end_id, bytewise.image_pad_id
    for ids, said in (
        ([start, 97], "no </img>"),
        ([start, *[97] * 256, end], "padding"),
        ([start, 97, pad, end], "256 slots"),
        ([start, 258, *[pad] * 255, end], "not the bytes"),
        ([start, 0xFF, *[pad] * 255, end], "not the bytes"),
    ):
        with pytest.raises(ValueError, match=said):
            bytewise.image_paths(ids)
        assert isinstance(bytewise.decode(ids), str)  # a model may have made it up


def test_images_in_batches(bytewise):
    texts = ["<img>a.png</img>x", "no image"]
    padded = bytewise(texts, padding=True, return_tensors="pt")
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (2, 259)
    assert padded["attention_mask"].sum(dim=1).tolist() == [259, 8]
    left = bytewise(texts, padding=True, padding_side="left", return_tensors="pt")["input_ids"]
    assert torch.equal(left[1, -8:], padded["input_ids"][1, :8])
    alone = bytewise(texts[0], return_tensors="pt")["input_ids"]
    assert torch.equal(alone[0], padded["input_ids"][0])
    encoded = bytewise(texts[0], return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(0, 5), *[(5, 10)] * 256, (10, 16), (16, 17)]
    with pytest.raises(ValueError, match="not cut"):
        bytewise(texts, truncation=True, max_length=100)
    assert len(bytewise.tokenize(texts[0])) == 259


# ChatML


def conversation(turns):
    """A recorded conversation as a record: images' paths become marks, and pictures."""
    texts = [regex.sub("<img>.*?</img>", "<image>", text) for _, text in turns]
    shown = sum(text.count("<image>") for text in texts)
    return tiny.record("recorded", *texts, images=tuple(range(shown)))


def without_paths(ids, tokenizer):
    """Ids with empty images: we give pixels, not paths."""
    for start, end in tokenizer._spans(ids):
        ids = [*ids[: start + 1], *[tokenizer.image_pad_id] * 256, *ids[end:]]
    return ids


@pytest.mark.parametrize("name", ["chatml_text", "chatml_image"])
def test_the_recorded_conversations(qwen, gold, name):
    recorded = gold[name]
    record = conversation(recorded["conversations"])
    sample = encode(record, qwen, answer=True, labels="upstream")
    assert list(sample.ids) == without_paths(recorded["input_ids"], qwen)
    assert list(sample.labels) == recorded["labels"]


def test_the_recorded_training_samples(cases):
    """The recording's tokenizer is of bytes, too, but has other ids for the special tokens."""
    folder = cases / "golden" / "qwen_vl"
    from safetensors.torch import load_file

    numbers = load_file(folder / "golden.safetensors")
    tokenizer = tiny.family("qwen_vl").tokenizer
    theirs = {
        tokenizer.im_start_id: 310, tokenizer.im_end_id: 311, tokenizer.image_start_id: 300,
        tokenizer.image_end_id: 301, tokenizer.image_pad_id: 302,
    }  # fmt: skip
    for i, told in enumerate(json.loads((folder / "train_samples.json").read_text())):
        record = conversation([(turn["from"], turn["value"]) for turn in told["conversations"]])
        sample = encode(record, tokenizer, answer=True, labels="upstream")
        there = numbers["train.attention_mask"][i]
        recorded = numbers["train.input_ids"][i][there].tolist()
        if 300 in recorded:
            start = recorded.index(300)
            recorded[start + 1 : start + 257] = [302] * 256
        ids, labels = ([theirs.get(token, token) for token in each] for each in (sample.ids, sample.labels))
        assert len(ids) <= len(there) + 1  # the recording is cut at 380 tokens, one short of its longest sample
        assert ids[: len(there)] == recorded
        assert labels[: len(there)] == numbers["train.labels"][i][there].tolist()


def test_learned_is_the_answer_and_its_end(bytewise):
    asked = tiny.record("x", "What is it?", "A cat.", "And now?", "Gone.")
    whole, prompt = (encode(asked, bytewise, answer=answer, labels="answer") for answer in (True, False))
    said = bytewise.decode([label for label in whole.labels if label != IGNORED])
    assert said == "A cat.<|im_end|>Gone.<|im_end|>"
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert bytewise.decode(prompt.ids).endswith("And now?<|im_end|>\n<|im_start|>assistant\n")
    assert bytewise.decode(whole.ids).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat")
    assert bytewise.decode(whole.ids[len(prompt.ids) :]) == "Gone.<|im_end|>\n"


def test_a_system_turn_takes_the_place_of_the_usual_one(bytewise):
    sample = encode(tiny.record("x", "Hello", "Hi.", system="Be brief."), bytewise, answer=True, labels="answer")
    assert bytewise.decode(sample.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What?", "What?"),
        ("<image>\nWhat?", "Picture 3: <image>\nWhat?"),
        ("What?\n<image>", "Picture 3: <image>\nWhat?"),
        ("<image>", "Picture 3: <image>\n"),
        ("<image>\n<image>\nWhich?", "Picture 3: <image>\nPicture 4: <image>\nWhich?"),
        ("Is <image> as <image>?", "Is Picture 3: <image>\n as Picture 4: <image>\n?"),
        ("Picture 1: <image>\nWhat?", "Picture 1: <image>\nWhat?"),
        ("Picture 7:<image>\nPicture 8:<image>\nWhich?", "Picture 7:<image>\nPicture 8:<image>\nWhich?"),
    ],
)
def test_images_are_captioned_and_counted(text, expected):
    assert captioned(text, first=3) == expected


def test_images_are_counted_over_the_conversation(bytewise):
    asked = tiny.record("x", "<image>\nWhat?", "A cat.", "And <image>?", "A dog.", images=(1, 2))
    sample = encode(asked, bytewise, answer=True, labels="answer")
    text = bytewise.decode(sample.ids)
    assert "user\nPicture 1: <img></img>\nWhat?<|im_end|>" in text
    assert "user\nPicture 2: <img></img>\nAnd ?<|im_end|>" in text
    assert sample.ids[sample.image_end] == bytewise.image_end_id
    assert bytewise.image_end_id not in sample.ids[sample.image_end + 1 :]


@pytest.mark.parametrize(
    ("texts", "images", "said"),
    [
        (("What?", "<image>"), (1,), "not the user's"),
        (("<image> What?", "red"), (), "1 <image> marks for 0 images"),
        (("What?", "red"), (1,), "0 <image> marks for 1 images"),
        (("<img>a.png</img>What?", "red"), (), "written as"),
    ],
)
def test_images_without_a_place_are_refused(bytewise, texts, images, said):
    with pytest.raises(DataError, match=said):
        encode(tiny.record("x", *texts, images=images), bytewise, answer=True, labels="answer")


def test_html_is_text(bytewise):
    sample = encode(tiny.record("x", "What does <img> do?", "It shows."), bytewise, answer=True, labels="answer")
    assert bytewise.image_start_id not in sample.ids


def test_the_chat_template_says_the_same(bytewise):
    asked = tiny.record("x", "<image>\nWhat?", "A cat.", "Why?", "So.", images=(1,))
    said = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    text = bytewise.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert bytewise(text)["input_ids"] == list(encode(asked, bytewise, answer=False, labels="answer").ids)
    brief = [{"role": "system", "content": "Be brief."}, *said, {"role": "assistant", "content": "So."}]
    whole = tiny.record("x", "<image>\nWhat?", "A cat.", "Why?", "So.", images=(1,), system="Be brief.")
    text = bytewise.apply_chat_template(brief, tokenize=False)
    assert bytewise(text)["input_ids"] == list(encode(whole, bytewise, answer=True, labels="answer").ids)

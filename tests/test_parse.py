from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from own_data import chat, image, jsonl, llava
from peft_mllm.data.formats import RecordFile
from peft_mllm.data.problems import BadDataError


def codes(file: RecordFile, number: int = 0) -> list[str]:
    return [each.code for each in file.parse(number).problems]


def one(tmp_path: Path, record: object) -> RecordFile:
    return RecordFile(jsonl(tmp_path / "one.jsonl", [record]))


def turns(*pairs: tuple[str, str]) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


Q, A = ("human", "q"), ("gpt", "a")

RECORDS: list[tuple[object, list[str]]] = [
    ('{"id": 1', ["json-broken"]),
    ('{"id": 1},', ["json-broken"]),
    ('{"x": NaN}', ["json-broken"]),
    ('{"x": ' + "[" * 100_000, ["json-broken"]),
    ('{"x": %s}' % ("9" * 5000), ["json-broken"]),
    ('{"id": 1, "id": 2}', ["duplicate-key"]),
    ('{"conversations": [{"from": "human", "from": "gpt"}]}', ["duplicate-key"]),
    (llava("\ud83d"), ["bad-unicode"]),
    ('"text"', ["not-an-object"]),
    ("null", ["not-an-object"]),
    ({}, ["conversation-missing"]),
    ({"conversations": []}, ["conversation-missing"]),
    ({"messages": "hello", "images": ["a", "b"]}, ["conversation-missing"]),
    (turns(("system", "s")), ["conversation-missing"]),
    ({"converstions": []}, ["misspelt-key"]),
    (llava(imgae="a.png"), ["misspelt-key"]),
    (llava(img="a.png"), ["misspelt-key"]),
    (llava("q", ID="a"), ["misspelt-key"]),
    ({"conversations": [{"form": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["misspelt-key"]),
    (llava("q", image_id=3, conversation_id=4, idx=5), []),
    (llava("q") | chat("q"), ["conflicting-keys"]),
    (llava(image="a", images=["a"]), ["conflicting-keys"]),
    (llava("q", id=""), ["id-invalid"]),
    (llava("q", id=[1]), ["id-invalid"]),
    (llava("q", id=1.5), ["id-invalid"]),
    ({"conversations": ["q", "a"]}, ["turn-invalid", "turn-invalid"]),
    ({"conversations": [{"value": "q"}]}, ["turn-invalid"]),
    (chat(None), ["turn-invalid"]),
    (chat([{"type": "image_url"}]), ["turn-invalid"]),
    (turns(("bot", "q"), A), ["role-unknown"]),
    (turns(Q, ("system", "s"), A), ["system-not-first"]),
    (turns(A, Q, A), ["first-turn-not-user"]),
    (turns(Q, Q, A), ["same-role-twice"]),
    (turns(Q, A, A), ["same-role-twice"]),
    (turns(Q, A, Q), ["last-turn-not-assistant"]),
    (turns(Q, ("gpt", " \n")), ["empty-answer"]),
    (turns(Q, ("gpt", ""), Q, A), ["empty-answer"]),
    (turns(("human", " "), A), ["empty-question"]),
    (llava("", image="a.png"), []),
    (llava("<image>", image="a.png"), []),
    (llava("<image>"), ["image-mark-count"]),
    (llava("<image><image>", image="a.png"), ["image-mark-count"]),
    (llava("q", image=["a.png", "b.png"]), ["image-mark-count"]),
    (llava("q", "see <image>", image="a.png"), ["image-mark-place"]),
    (llava("Picture 1: <img>a.png</img> q"), []),
    (llava("<img></img> q"), ["image-path-invalid"]),
    (llava("<img>a.png</img> q", image="a.png"), ["image-inline"]),
    (llava("<img>a.png</img> and <image>", image="b.png"), ["image-inline"]),
    (llava("q", "see <img>a.png</img>"), ["image-inline"]),
    (llava("q", "<ref>it</ref><box>(1,2),(30,999)</box> <quad>(1,2),(3,4),(5,6),(7,8)</quad>"), []),
    (llava("q", "<box>(1,2),(30,1000)</box>"), ["grounding-odd"]),
    (llava("q", "<ref>it<box>(1,2),(3,4)</box>"), ["grounding-odd"]),
    (llava("q </s>"), ["special-token"]),
    (llava("q <|im_end|>"), ["special-token"]),
    (llava("q \ufffd"), ["odd-character"]),
    (llava("q \x00"), ["odd-character"]),
    (llava(image=""), ["image-path-invalid"]),
    (llava(image=5), ["image-path-invalid"]),
    (llava(image={"bytes": "x"}), ["image-path-invalid"]),
    (llava(image="a\0.png"), ["image-path-invalid"]),
    (llava(image="https://example.org/a.png"), ["image-url"]),
    (llava(image="data:image/png;base64,AAAA"), ["image-url"]),
    (llava(image="file:///etc/passwd"), ["image-url"]),
    (chat([{"type": "image", "url": "http://a/b"}]), ["image-url"]),
    (llava(image="../a.png"), ["image-outside-root"]),
    (llava(image="/etc/passwd"), ["image-outside-root"]),
    (llava(image="x/../../a.png"), ["image-outside-root"]),
]


@pytest.mark.parametrize(("record", "expected"), RECORDS, ids=lambda value: str(value)[:50])
def test_each_fault_has_one_finding(tmp_path: Path, record: object, expected: list[str]) -> None:
    file = one(tmp_path, record)
    assert codes(file) == expected
    for each in file.parse(0).problems:
        assert each.reason
        assert each.remedy.endswith((".", "?", "`."))
        assert str(each).isprintable()
    if any(each.severity == "error" for each in file.parse(0).problems):
        with pytest.raises(BadDataError, match=r"one\.jsonl:1: "):
            file[0]


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(llava("q")).encode() + b'\n{"id": "caf\xe9"}\n')
    assert "Byte 0xe9 at column 12" in RecordFile(path).parse(1).problems[0].reason


def test_no_link_leads_out_of_the_root(tmp_path: Path) -> None:
    image(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    records = [llava(image=name) for name in ("link.png", "up/secret.png")]
    file = RecordFile(jsonl(tmp_path / "data" / "a.jsonl", records))
    assert [codes(file, n) for n in range(2)] == [["image-outside-root"]] * 2
    wider = RecordFile(file.path, image_root=tmp_path)
    assert wider.parse(0).problems == ()


def test_absolute_path_inside_the_root(tmp_path: Path) -> None:
    assert one(tmp_path, llava(image=str(tmp_path / "a.png"))).parse(0).problems == ()


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    file = one(tmp_path, llava(image="../\x1b[31m.png" + "x" * 5000))
    text = str(file.parse(0).problems[0])
    assert text.isprintable()
    assert len(text) < 800


def test_the_error_survives_a_worker(tmp_path: Path) -> None:
    with pytest.raises(BadDataError) as caught:
        one(tmp_path, turns(A, Q))[0]
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert str(copy) == str(caught.value)
    assert (copy.code, copy.reason, copy.remedy) == (
        caught.value.code,
        caught.value.reason,
        caught.value.remedy,
    )


# Anything at all.


@settings(max_examples=100, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["id", "image", "images", "conversations", "messages", "from", "value", "role"])
                | st.sampled_from(["content", "type", "text"])
                | st.text(max_size=4),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_record_or_has_a_reason(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = jsonl(tmp_path_factory.getbasetemp() / "any.jsonl", [{"id": "x"}, json.dumps(value)])
    parsed = RecordFile(path).parse(1)
    assert parsed.record is not None or parsed.problems

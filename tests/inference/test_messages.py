"""Conversations of other programs: accepted forms, and one clear line for every other."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from unclipped.core.errors import UsageError
from unclipped.data.sample import ImagePart, TextPart
from unclipped.inference.messages import sample_from_messages


def encoded() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


IMAGE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": IMAGE}, IMAGE),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "url": "a.png"}, "a.png"),
        ({"type": "image", "url": "file:///x/a%20b.png"}, Path("/x/a b.png")),
        ({"type": "image", "base64": encoded()}, base64.b64decode(encoded())),
        (
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded()}"}},
            base64.b64decode(encoded()),
        ),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
    ],
)
def test_image_parts(part: dict, source: object) -> None:
    sample = sample_from_messages([{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}])
    assert sample.turns[0].parts == (ImagePart(source), TextPart("what?"))  # type: ignore[arg-type]


def test_turns_and_plain_strings() -> None:
    sample = sample_from_messages(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": ["three"]},
        ]
    )
    assert [(turn.role, turn.text) for turn in sample.turns] == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
    ]


def user(*parts: object) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "usr", "content": "a"}], "message 0: role 'usr'; did you mean 'user'"),
        ([{"role": "assistant", "content": "a"}], "last message has role 'assistant'"),
        ([{"role": "user"}], "content must be a text or a list of parts, found NoneType"),
        (user({"type": "video", "video": "a"}), "part 0: type 'video'"),
        (user({"type": "text"}), "needs 'text'"),
        (user({"type": "image"}), "needs 'image', 'path' or 'url'"),
        (user({"type": "image", "url": "https://example.org/a.png"}), "not fetched from the network"),
        (user({"type": "image", "url": "data:image/png,abc"}), "as a data: URI"),
        (user({"type": "image", "base64": "?"}), "not valid base64"),
        ([{"role": "user", "content": "a", "tool_calls": [{"id": 1}]}], "message 0: 'tool_calls' is not read here"),
        (user(3), "part 0: type None"),
    ],
)
def test_bad_messages(messages: list, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        sample_from_messages(messages)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

"""One row of whatever format -> a validated record: the only place that knows what a row means.

jsonl, JSON lists, the sidecars of tars, parquet and TFDS differ in how a row is found, not in what
it says; all give `make_record` a dictionary.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from hovle_jax.data import files
from hovle_jax.data.records import IMAGE_PLACEHOLDER, Record, Role, Turn, validate
from hovle_jax.errors import UserError, one_line

# What a user turn asks for where the data has captions only.
PROMPT = "Describe the image."

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_TALK_KEYS = ("conversations", "messages")
_IMAGE_KEYS = ("image", "images")
_CAPTION_KEYS = ("caption", "text")
_ROLE_KEYS = ("from", "role")
_TEXT_KEYS = ("value", "text", "content")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
# All that `make_record` looks at.
ROW_KEYS = (
    *(*_IMAGE_KEYS, *_TALK_KEYS, *_CAPTION_KEYS),
    *("status", "error_message", *_OTHER_MEDIA),
)

Image = str | bytes  # a path, or encoded

SURROGATE = re.compile(r"[\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = 12


def _shown(value: Any) -> str:
    """A value as an error message can hold it: short, and on one line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a huge {type(value).__name__}"


def load_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a row; UserError if it is none, or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # json would keep the last without a word
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise UserError(f"{where}: the key {_shown(twice)} is there twice; keep one")
        return found

    try:
        # Given bytes, json guesses UTF-16 and lets half surrogates pass.
        row = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON ({one_line(e)}); fix or delete the row") from e
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def make_record(
    row: Mapping[str, Any],
    where: str,
    *,
    root: str = "",
    prompt: str = PROMPT,
    beside: Sequence[bytes] | None = None,
    images_only: bool = False,
) -> Record:
    """A validated record of a row.

    A row has 'conversations' of 'from' and 'value' (InternVL, LLaVA) or 'messages' of 'role' and
    'content' (OpenAI, Qwen), else a 'caption', else a 'text'. A caption becomes the user turn
    '<image>\\n' + prompt and the assistant turn caption. Where a conversation has one image and no
    '<image>', '<image>\\n' is put before its first user turn.

    Images are under 'image' or 'images', or in the content parts of user turns. An image is a
    path, a 'data:...;base64,' URI, bytes, or Hugging Face's {bytes, path}. A key whose value is
    None counts as missing, as parquet's structs have all keys in all rows.

    Args:
      row: The fields; others than these are ignored.
      where: 'file:row', which opens every error message.
      root: Directory of relative image paths.
      prompt: The user turn of a caption.
      beside: Encoded images that the container holds for the row, which then only names them.
      images_only: The record has all images of the row and no turns.

    Raises:
      UserError: the row cannot be trained on.
    """
    # img2dataset keeps the rows of failed downloads, caption included.
    if row.get("status") not in (None, "success"):
        status, reason = _shown(row["status"]), _shown(row.get("error_message"))
        raise UserError(f"{where}: status is {status}, not 'success' ({reason})")
    for key in _OTHER_MEDIA:
        if row.get(key):
            raise UserError(f"{where}: {key} is not supported; delete the row")
    keys = [key for key in _IMAGE_KEYS if _has(row, key) and row[key] not in ("", [])]
    lists = [_images(row[key], root, where) for key in keys]
    _agree(lists, keys, where)
    named = lists[0] if lists else ()
    turns: tuple[Turn, ...] | None = None
    inline: tuple[Image | None, ...] = ()
    # Of a row that is read for its images the conversation need not be in order.
    if not (images_only and (named or beside)):
        keys = [key for key in _TALK_KEYS if _has(row, key)]
        talks = [_conversation(row[key], key, root, where) for key in keys]
        _agree(talks, keys, where)
        turns, inline = talks[0] if talks else (None, ())
    images = _choose(named, inline, beside, where)
    if images_only:
        if not images:
            raise UserError(f"{where}: no image; its keys are {_shown(sorted(row))}")
        turns = ()
    elif turns is None:
        turns = _captioned(row, len(images), prompt, where)
    elif len(images) == 1:
        turns = _marked(turns)
    texts = [turn.text for turn in turns] + [x for x in images if isinstance(x, str)]
    if any(SURROGATE.search(text) for text in texts):  # JSON can spell it, nothing can encode it
        raise UserError(f"{where}: half a surrogate pair is not valid Unicode")
    record = Record(turns, images, where)
    if not images_only:
        validate(record)
    return record


def _has(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) is not None


def _one_of(fields: Mapping[str, Any], keys: tuple[str, ...], where: str) -> Any:
    """The value under one of several keys; None where there is none."""
    found = [fields[key] for key in keys if fields.get(key) is not None]
    if len(found) > 1:
        _agree(found, [key for key in keys if _has(fields, key)], where)
    return found[0] if found else None


def _agree(values: Sequence[Any], keys: Sequence[str], where: str) -> None:
    if any(value != values[0] for value in values):
        raise UserError(f"{where}: {' and '.join(map(repr, keys))} differ; keep one of them")


def _images(value: Any, root: str, where: str) -> tuple[Image, ...]:
    return tuple(_image(x, root, where) for x in (value if isinstance(value, list) else [value]))


def _image(value: Any, root: str, where: str) -> Image:
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        value = data if data else path
        if not value or not isinstance(data, bytes | None):
            raise UserError(f"{where}: an image has neither bytes nor a path")
    if not isinstance(value, str | bytes) or not value:
        got = _shown(value)
        raise UserError(f"{where}: 'image' must be a path or a list of paths, got {got}")
    if isinstance(value, bytes):
        return value
    if value[:5].lower() == "data:":
        return _data_uri(value, where)
    if value[:8].lower().startswith(("http://", "https://")):
        raise UserError(f"{where}: {_shown(value)} is not fetched; download the image")
    if "\0" in value:
        raise UserError(f"{where}: the image path {_shown(value)} has a zero byte")
    return files.join(root, value.removeprefix("file://"))


def _data_uri(uri: str, where: str) -> bytes:
    head, _, data = uri.partition(",")
    try:
        decoded = base64.b64decode(data, validate=True) if head.endswith(";base64") else b""
    except (binascii.Error, ValueError):
        decoded = b""
    if not decoded:
        got = _shown(uri)
        raise UserError(f"{where}: {got} is no image as 'data:image/...;base64,...'")
    return decoded


def _conversation(
    messages: Any, key: str, root: str, where: str
) -> tuple[tuple[Turn, ...], tuple[Image | None, ...]]:
    """The turns, and per image part what it names: None where it takes the row's next image."""
    if not isinstance(messages, list):
        raise UserError(f"{where}: {key!r} must be a list of turns, got {_shown(messages)}")
    turns: list[Turn] = []
    inline: list[Image | None] = []
    for message in messages:
        if not isinstance(message, dict):
            got = _shown(message)
            raise UserError(f"{where}: a turn must be a JSON object, got {got}")
        role = _one_of(message, _ROLE_KEYS, where)
        if not isinstance(role, str) or role not in _ROLES:
            known = ", ".join(_ROLES)
            raise UserError(f"{where}: unknown role {_shown(role)}; use one of {known}")
        text = _one_of(message, _TEXT_KEYS, where)
        if isinstance(text, list):
            text, images = _joined(text, root, where)
            if images and _ROLES[role] != "user":
                raise UserError(f"{where}: a {role} turn has an image; only user turns may")
            inline += images
        if not isinstance(text, str):
            raise UserError(f"{where}: a {role} turn has no text under 'value'")
        turns.append(Turn(_ROLES[role], text))
    return tuple(turns), tuple(inline)


def _joined(parts: list[Any], root: str, where: str) -> tuple[str, list[Image | None]]:
    """A list of content parts as InternVL's text with placeholders, and what its images name."""
    text = ""
    images: list[Image | None] = []
    for part in parts:
        kind, value = None, None
        if isinstance(part, dict):
            kind = part.get("type")
            value = part.get("image_url" if kind == "image_url" else "image")
        if kind == "image_url" and isinstance(value, dict):
            value = value.get("url")
        if kind == "image" or (kind == "image_url" and value is not None):
            text += f"{IMAGE_PLACEHOLDER}\n"
            images.append(None if value is None else _image(value, root, where))
        elif kind == "text" and isinstance(part.get("text"), str) and not value:
            text += part["text"]
        else:
            got = _shown(part)
            raise UserError(f"{where}: content part {got} is neither a text nor an image")
    return text, images


def _choose(
    named: tuple[Image, ...],
    inline: tuple[Image | None, ...],
    beside: Sequence[bytes] | None,
    where: str,
) -> tuple[Image, ...]:
    """The images of a row that may say twice which they are."""
    given = tuple(image for image in inline if image is not None)
    if given and len(given) < len(inline):
        raise UserError(f"{where}: some image parts name their image and some do not")
    if given and named and given != named:
        raise UserError(f"{where}: the image parts name other images than 'image'; keep one")
    named = given or named
    if beside is None:
        return named
    paths = [image for image in named if isinstance(image, str)]
    if named and len(named) != len(beside) and (beside or paths):
        raise UserError(f"{where}: the row names {len(named)} images, {len(beside)} come with it")
    if beside and len(paths) < len(named):
        raise UserError(f"{where}: an image is in the row, another one comes with it; keep one")
    return tuple(beside) or named


def _captioned(row: Mapping[str, Any], images: int, prompt: str, where: str) -> tuple[Turn, ...]:
    caption = next((row[k] for k in _CAPTION_KEYS if _has(row, k)), None)
    if not isinstance(caption, str):
        raise UserError(
            f"{where}: no caption (a string under 'caption' or 'text') and no 'conversations'; "
            f"its keys are {_shown(sorted(row))}"
        )
    if images != 1:
        raise UserError(f"{where}: a caption needs one image, the row has {images}")
    return Turn("user", f"{IMAGE_PLACEHOLDER}\n{prompt}"), Turn("assistant", caption)


def _marked(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The first user turn opens with the only image, unless a user turn says where it is."""
    users = [n for n, turn in enumerate(turns) if turn.role == "user"]
    if not users or any(IMAGE_PLACEHOLDER in turns[n].text for n in users):
        return turns
    n = users[0]
    first = Turn("user", f"{IMAGE_PLACEHOLDER}\n{turns[n].text}")
    return (*turns[:n], first, *turns[n + 1 :])

"""Ids of the chat's tokens, as the tokenizer files of a directory give them.

Only names and ids of added tokens are read, whatever the kind of tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hovle_jax.config import ModelConfig
from hovle_jax.data.tokenizer import TOKEN_FIELDS
from hovle_jax.errors import UserError


def _by_name(raw: Any) -> dict[str, int]:
    return {str(token): int(i) for token, i in raw.items()}


def _decoder(raw: Any) -> dict[str, int]:
    listed = raw.get("added_tokens_decoder") or {}
    return {str(entry["content"]): int(i) for i, entry in listed.items()}


def _listed(raw: Any) -> dict[str, int]:
    return {str(entry["content"]): int(entry["id"]) for entry in raw.get("added_tokens") or ()}


_FILES = {
    "added_tokens.json": _by_name,
    "tokenizer_config.json": _decoder,
    "tokenizer.json": _listed,
}


def token_ids(directory: str | Path) -> dict[str, int]:
    """{ModelConfig field: id} of the tokens that the directory's files name; {} without files.

    Raises:
      UserError: a malformed file, or two that disagree.
    """
    found: dict[str, tuple[int, str]] = {}
    for name, read in _FILES.items():
        path = Path(directory) / name
        if not path.is_file():
            continue
        try:
            ids = read(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{path}: malformed or unreadable ({error!r})") from None
        for field, token in TOKEN_FIELDS.items():
            if token not in ids:
                continue
            i, other = found.setdefault(field, (ids[token], name))
            if i != ids[token]:
                raise UserError(f"{path}: {token} is {ids[token]}, but {i} in {other}")
    return {field: i for field, (i, _) in found.items()}


def check_ids(config: ModelConfig, directory: str | Path, *, complete: bool = False) -> None:
    """Ids of another model's tokens would be nonsense without a sound.

    Args:
      complete: All four tokens must be there.

    Raises:
      UserError: files that disagree with the config.
    """
    found = token_ids(directory)
    for field, token in TOKEN_FIELDS.items():
        if field in found and found[field] != getattr(config, field):
            raise UserError(
                f"{directory}: {token} is {found[field]} in the tokenizer's files, but "
                f"{getattr(config, field)} in the model's config ({field})"
            )
        if complete and field not in found:
            raise UserError(f"{directory}: the tokenizer has no token {token}")

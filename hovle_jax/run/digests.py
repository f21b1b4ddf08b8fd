"""What the files of a checkpoint were when they were written: digests.json lists size and digest.

Compressed arrays carry no checksum: without the list a flipped bit would be read as a number.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from hovle_jax.errors import UserError, one_line

NAME = "digests.json"
_UNLISTED = (NAME, "_CHECKPOINT_METADATA")  # orbax adds the date of the rename to its own
_BUFFER = 1 << 20
Table = dict[str, list[int]]  # {path below the directory: [bytes, CRC-32]}


def files(directory: epath.Path) -> Iterator[str]:
    """Paths of all files below `directory`, relative to it."""
    for path in directory.iterdir():
        if path.is_dir():
            yield from (f"{path.name}/{below}" for below in files(path))
        elif path.name not in _UNLISTED:
            yield path.name


def digest(directory: epath.Path, names: Iterable[str]) -> Table:
    """Reads the files `names` of `directory`."""
    with ThreadPoolExecutor(8) as pool:
        futures = {name: pool.submit(_digest, directory / name) for name in names}
        return {name: future.result() for name, future in futures.items()}


def _digest(path: epath.Path) -> list[int]:
    size, crc = 0, 0  # CRC: against damage, not against malice, and faster than a disk
    with path.open("rb") as file:
        while block := file.read(_BUFFER):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def write(directory: epath.Path, known: Table | None = None) -> None:
    """Lists all files of `directory`, of which it reads those that `known` has not."""
    known = known or {}
    found = sorted(files(directory))
    table = {k: v for k, v in known.items() if k in found}
    table |= digest(directory, (name for name in found if name not in known))
    (directory / NAME).write_bytes(_text(table))


def _text(table: Table) -> bytes:
    """The list as a file, which vouches for itself, too."""
    crc = zlib.crc32(json.dumps(table, sort_keys=True).encode())
    return json.dumps({"files": table, "crc": crc}, indent=0, sort_keys=True).encode()


def read(directory: epath.Path) -> Table:
    """The list of `directory`; UserError where it has none that can be read."""
    path = directory / NAME
    try:
        text = path.read_bytes()
        table: Table = json.loads(text)["files"]
        if _text(table) != text:
            raise ValueError("holds other bytes than were written")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the directory was not written to its end") from None
    except Exception as error:  # every store has its own
        raise UserError(f"{path}: damaged or not readable ({one_line(error)})") from None
    return table


def damage(
    directory: epath.Path,
    under: str = "",
    *,
    contents: bool = True,
    share: tuple[int, int] = (0, 1),
) -> list[str]:
    """One line for every file that is not what it was when it was written; none: all is well.

    under: only files whose path begins so. contents: read them, too, and not only their sizes.
    share: (which, of how many) parts of the files to look at, for hosts that divide the work.
    """
    try:
        table = read(directory)
    except UserError as error:
        return [str(error)]
    wanted = sorted(name for name in table if name.startswith(under))
    if not wanted:
        return [f"{directory / NAME}: lists nothing in {under}"]
    # Neighbours in size go to different hosts.
    wanted.sort(key=lambda name: int(table[name][0]))
    mine = wanted[share[0] :: share[1]]

    def look(name: str) -> str:
        path, (size, want) = directory / name, table[name]
        try:
            found = path.stat().length
            if found != size:
                return f"{path}: has {found:,} bytes, {size:,} when it was written"
            if contents and _digest(path) != [size, want]:
                return f"{path}: holds other bytes than were written"
        except FileNotFoundError:
            return f"{path}: missing"
        except Exception as error:
            return f"{path}: cannot be read ({one_line(error)})"
        return ""

    with ThreadPoolExecutor(8) as pool:
        return [line for line in pool.map(look, mine) if line]

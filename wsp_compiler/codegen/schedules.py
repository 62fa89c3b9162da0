"""The schedule database: measured times of kernels on layers, as plain JSON.

A user's own records are lines of one file beside the kernel cache; records that ship are one JSON file per device
in ``tables/``. Appending is one write of whole lines under a lock, so many processes may share the file; a damaged
line is skipped with a warning and costs that record alone. ``WSP_TABLE_DIR`` names another folder of shipped
tables; an empty value turns them off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wsp_compiler.codegen.cache import cache_directory
from wsp_compiler.codegen.schedule_records import LayerKey, Record, record_from_json
from wsp_compiler.speed import MEASURED, OTHER_KERNELS, TABLE

logger = logging.getLogger("wsp_compiler")

FILE_NAME = "schedules.jsonl"


def parse_lines(text: str, where: str) -> list[Record]:
    """The records of a JSON-lines text; lines that are none are skipped with a warning."""
    found: list[Record] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(record_from_json(json.loads(line)))
        except (ValueError, RecursionError) as error:
            logger.warning("%s, line %d is no schedule record (%s), skipped", where, number, error)
    return found


def append_records(path: pathlib.Path, records: Sequence[Record]) -> None:
    """Add records to a file; failing to do so is logged, not raised."""
    lines = "".join(json.dumps(record.to_json(), allow_nan=False) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file, _locked(file.fileno()):
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line torn by a crash: end it, so that it alone is lost
                    lines = "\n" + lines
            file.write(lines.encode())
            file.flush()
    except OSError as error:
        logger.warning("schedule database %s is not writable (%s)", path, error)


@contextlib.contextmanager
def _locked(descriptor: int) -> Generator[None]:
    """An exclusive lock where the system has one; an appended line is whole without it too."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield  # closing the file unlocks it


def table_directory() -> pathlib.Path | None:
    """Folder of the shipped tables, or None if they are turned off."""
    override = os.environ.get("WSP_TABLE_DIR")
    if override is not None:
        return pathlib.Path(override) if override else None
    return pathlib.Path(__file__).with_name("tables")


def save_table(path: pathlib.Path, records: Iterable[Record], notes: Mapping[str, Any]) -> None:
    """Write a shipped table in one step: keys once, each with its times. ``notes`` says where it was measured."""
    layers: dict[LayerKey, list[dict[str, Any]]] = {}
    for record in records:
        entry = record.to_json()
        del entry["key"]
        layers.setdefault(record.key, []).append(entry)
    body = [json.dumps({"key": dataclasses.asdict(key), "times": times}) for key, times in layers.items()]
    text = f'{{"notes": {json.dumps(dict(notes))},\n"layers": [\n' + ",\n".join(body) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_table(path: pathlib.Path) -> list[Record]:
    """The records of a shipped table; a damaged file counts as empty, with a warning."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return [
            record_from_json({**time, "key": layer["key"]}) for layer in layers for time in layer["times"]
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("schedule table %s is unusable (%s)", path, error)
        return []


def _apart_from_details(key: LayerKey) -> LayerKey:
    """What two keys have in common if only the epilogue or the kernels' version differs."""
    return dataclasses.replace(key, generator="", epilogue="")


def _apart_from_rows(key: LayerKey) -> LayerKey:
    """What two keys of one version have in common if only the kept rows or the epilogue differ."""
    return dataclasses.replace(key, epilogue="", rows=(0, 0), block=0)


MOST_MORE_ROWS = 1.35
"""A layer with so many times the kept rows still says how to run one with fewer."""


@dataclass
class Schedules:
    """All records this process can see: the user's own, the shipped tables', and those it has just measured.

    Attributes:
        path: the user's own file; None keeps new records in memory only.
        tables: folder of shipped tables, or None.
    """

    path: pathlib.Path | None
    tables: pathlib.Path | None
    _own: dict[str, Record] = field(default_factory=dict[str, Record], init=False)
    _shipped: dict[str, Record] = field(default_factory=dict[str, Record], init=False)
    _near: dict[LayerKey, list[tuple[Record, bool]]] = field(
        default_factory=dict[LayerKey, list[tuple[Record, bool]]], init=False
    )

    _rows: dict[LayerKey, list[Record]] = field(default_factory=dict[LayerKey, list[Record]], init=False)

    def __post_init__(self) -> None:
        for table in sorted(self.tables.glob("*.json")) if self.tables and self.tables.is_dir() else ():
            self._shipped |= {record.identity: record for record in load_table(table)}
        text = ""
        if self.path is not None:
            try:
                text = self.path.read_bytes().decode("utf-8", errors="replace")
            except FileNotFoundError:
                pass
            except OSError as error:
                logger.warning("schedule database %s is unusable (%s)", self.path, error)
        self._own = {record.identity: record for record in parse_lines(text, str(self.path))}
        self._index()

    def _index(self) -> None:
        self._near.clear()
        self._rows.clear()
        for records, own in ((self._own, True), (self._shipped, False)):
            for record in records.values():
                self._near.setdefault(_apart_from_details(record.key), []).append((record, own))
                self._rows.setdefault(_apart_from_rows(record.key), []).append(record)

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedules:
        return self  # compiled modules that are copied share their records

    @property
    def records(self) -> tuple[Record, ...]:
        """Everything known, own records before shipped ones."""
        shipped = (record for name, record in self._shipped.items() if name not in self._own)
        return (*self._own.values(), *shipped)

    def find(self, key: LayerKey) -> tuple[list[Record], str]:
        """What is known about a layer, and where it comes from; no records if nothing is.

        The first of these that has any: own records of this very key, shipped ones, own and shipped ones with
        another epilogue, shipped ones of other versions of the kernels.
        """
        near = self._near.get(_apart_from_details(key), [])
        current = [entry for entry in near if entry[0].key.generator == key.generator]
        exact = [entry for entry in current if entry[0].key == key]
        for entries in (exact, current):
            for own, source in ((True, MEASURED), (False, TABLE)):
                if found := [record for record, is_own in entries if is_own == own]:
                    return found, source
        return [record for record, own in near if not own], OTHER_KERNELS

    def less_pruned(self, key: LayerKey) -> list[Record]:
        """Records of the same layer with the fewest kept rows that are no fewer than its own, and not many more.

        What serves more rows serves fewer, in no more time.
        """
        found = [
            record
            for record in self._rows.get(_apart_from_rows(key), ())
            if all(
                own <= other <= MOST_MORE_ROWS * own + 8
                for own, other in zip(key.rows, record.key.rows, strict=True)
            )
        ]
        least = min((record.key.rows for record in found), default=None)
        return [record for record in found if record.key.rows == least]

    def in_other_groups(self, key: LayerKey) -> list[Record]:
        """Shipped records of the same layer with as many kept rows, shared out over other filter groups."""
        return [
            record
            for record in self._rows.get(_apart_from_rows(key), ())
            if (record.key.rows, record.key.epilogue) == (key.rows, key.epilogue)
            and self._shipped.get(record.identity) is record
        ]

    def add(self, records: Sequence[Record]) -> None:
        """Remember measurements and write them to the user's own file."""
        self._own |= {record.identity: record for record in records}
        self._index()
        if self.path is not None and records:
            append_records(self.path, records)


def open_schedules() -> Schedules:
    """The database of this user and this installation, read now."""
    directory = cache_directory()
    return Schedules(None if directory is None else directory / FILE_NAME, table_directory())

"""The pass pipeline: ordering by declared dependencies, and the one runner that executes passes."""

from __future__ import annotations

import difflib
import logging
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import networkx as nx
from torch import fx

from wsp_compiler.errors import OptionError, PassError
from wsp_compiler.passes.base import WSP_OPS, Pass, PassRecord, Rewrites
from wsp_compiler.plan import PruningPlan

logger = logging.getLogger("wsp_compiler")


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"near names: {', '.join(near)}; " * bool(near) + f"known: {', '.join(known)}"


def _name(entry: object) -> str:
    """Name of a pass.

    Raises:
        PassError: it is none.
    """
    if isinstance(entry, type) or not isinstance(entry, Pass):
        fix = f"write {entry.__name__}()" if isinstance(entry, type) else "subclass wsp_compiler.PassBase"
        raise PassError(f"{entry!r} is not a pass", where="Pipeline", fix=fix)
    if not entry.name:
        raise PassError(
            f"{type(entry).__name__} has no name",
            where="Pipeline",
            fix='declare name: str = field(default="my_pass", init=False)',
        )
    return entry.name


@dataclass(frozen=True)
class Pipeline:
    """An immutable list of passes; the editing methods return a new pipeline.

    ``edges`` holds (earlier, later) names added by :meth:`before` and :meth:`after`.
    """

    passes: tuple[Pass, ...]
    edges: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for entry in self.passes:
            _name(entry)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise PassError(
                f"several passes are named {twice[0]!r}", where="Pipeline", fix="use replace(), or rename one"
            )
        for edge in self.edges:
            for name in edge:
                self._index(name)

    @property
    def names(self) -> list[str]:
        """Names of the passes, in the order they were added."""
        return [entry.name for entry in self.passes]

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise PassError(f"no pass named {name!r}", where="Pipeline", fix=_near(name, self.names))
        return self.names.index(name)

    def _insert(self, index: int, added: Pass, edge: tuple[str, str]) -> Pipeline:
        return Pipeline((*self.passes[:index], added, *self.passes[index:]), (*self.edges, edge))

    def before(self, name: str, added: Pass) -> Pipeline:
        """With ``added`` run before the pass ``name``."""
        return self._insert(self._index(name), added, (_name(added), name))

    def after(self, name: str, added: Pass) -> Pipeline:
        """With ``added`` run after the pass ``name``."""
        return self._insert(self._index(name) + 1, added, (name, _name(added)))

    def without(self, name: str) -> Pipeline:
        """Without the pass ``name``."""
        index = self._index(name)
        edges = tuple(edge for edge in self.edges if name not in edge)
        return Pipeline((*self.passes[:index], *self.passes[index + 1 :]), edges)

    def replace(self, name: str, other: Pass) -> Pipeline:
        """With ``other`` in the place of the pass ``name``."""
        index = self._index(name)
        edges = tuple((other.name if a == name else a, other.name if b == name else b) for a, b in self.edges)
        return replace(self, passes=(*self.passes[:index], other, *self.passes[index + 1 :]), edges=edges)

    def ordered(self) -> list[Pass]:
        """The passes in an order that respects requires, provides, after, and before()/after() edits.

        Raises:
            PassError: an unknown dependency, or a cycle.
        """
        by_name = {entry.name: entry for entry in self.passes}
        providers: dict[str, list[str]] = {name: [name] for name in by_name}
        for entry in self.passes:
            for level in entry.provides:
                providers.setdefault(level, []).append(entry.name)
        order: nx.DiGraph[str] = nx.DiGraph()
        order.add_nodes_from(by_name)
        order.add_edges_from(self.edges)
        for entry in self.passes:
            for level in entry.requires:
                if not set(providers.get(level, ())) - {entry.name}:
                    raise PassError(
                        f"requires {level!r}, which no other pass provides",
                        where=f"pass {entry.name}",
                        fix=_near(level, sorted(providers)),
                    )
            for level in (*entry.requires, *entry.after):
                sources = set(providers.get(level, ())) - {entry.name}  # it may keep up what it requires
                order.add_edges_from((source, entry.name) for source in sources)
        position = {name: index for index, name in enumerate(by_name)}
        try:
            names = list(nx.lexicographical_topological_sort(order, key=position.__getitem__))
        except nx.NetworkXUnfeasible:
            edges: list[tuple[str, str]] = list(cast("Any", nx).find_cycle(order))
            cycle = [edges[0][0], *(edge[1] for edge in edges)]
            raise PassError(
                f"the passes depend on each other in a cycle: {' -> '.join(cycle)}",
                where="Pipeline",
                fix="drop one requires/after, or move the added pass",
            ) from None
        return [by_name[name] for name in names]


def remove_dead_code(gm: fx.GraphModule) -> None:
    """Erase what lowering orphaned. Unused calls of the model's own are kept: they may be in place."""

    def is_impure(node: fx.Node) -> bool:
        return node.op != "get_attr" and node.target not in WSP_OPS

    gm.graph.eliminate_dead_code(is_impure)


def run_pipeline(
    pipeline: Pipeline,
    gm: fx.GraphModule,
    plan: PruningPlan,
    *,
    unit: str = "",
    check: Callable[[fx.GraphModule, str], None] | None = None,
) -> list[PassRecord]:
    """Run every pass on ``gm`` in place.

    Args:
        pipeline: the passes.
        gm: a traced graph module of this package's own (its leaf modules may be shared with the user's).
        plan: what the passes have to obey.
        unit: path of the submodule that ``gm`` stands for; names dump files.
        check: called as check(gm, pass name) after each pass; raises if the meaning changed.

    Raises:
        PassError: a pass is wired wrongly, broke the graph or changed its meaning.
    """
    records: list[PassRecord] = []
    _dump(gm, unit, 0, "traced")
    for number, entry in enumerate(pipeline.ordered(), start=1):
        start = time.perf_counter()
        try:
            rewrites = entry.run(gm, plan)
            if not isinstance(cast("object", rewrites), Rewrites):
                raise TypeError(f"run returned {rewrites!r}, not Rewrites(count, declined)")
            remove_dead_code(gm)
            gm.graph.lint()
            gm.recompile()
        except PassError:
            raise
        except Exception as error:
            raise PassError(
                f"failed: {type(error).__name__}: {error}",
                where=f"pass {entry.name}",
                fix="set WSP_DUMP=directory to see the graph before it",
            ) from error
        records.append(PassRecord(entry.name, unit, rewrites, time.perf_counter() - start))
        logger.info("%s: %d rewrites, %d declined", entry.name, rewrites.count, len(rewrites.declined))
        _dump(gm, unit, number, entry.name)
        if check is not None:
            check(gm, entry.name)
    gm.delete_all_unused_submodules()
    return records


def _dump(gm: fx.GraphModule, unit: str, number: int, name: str) -> None:
    directory = os.environ.get("WSP_DUMP")
    if not directory:
        return
    folder = pathlib.Path(directory)
    stem = f"{unit}." if unit else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}{number:02d}_{name}.txt").write_text(f"{gm.graph}\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"cannot write the dump: {error}", where=f"WSP_DUMP={directory}", fix="name a writable directory"
        ) from error

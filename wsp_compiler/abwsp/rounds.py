"""The rounds of ABWSP (paper, section 4.3, "Evaluation & Pruning"): sample, judge, pick a winner, fine-tune it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from wsp_compiler.abwsp.choices import Choices
from wsp_compiler.abwsp.finetuning import Finetune, run_finetune
from wsp_compiler.abwsp.outlook import Networks
from wsp_compiler.abwsp.ranks import Ranks
from wsp_compiler.abwsp.result import Candidate, SearchResult
from wsp_compiler.abwsp.sampling import draw
from wsp_compiler.abwsp.seeds import seeded
from wsp_compiler.abwsp.state import Round, SearchState, StateFolder
from wsp_compiler.plan import PruningPlan

OnStep = Callable[[str], None]


def nothing(text: str) -> None:
    """No display."""


@dataclass
class Search:
    """A search between its preparation and its result. Every rank holds the same state and goes the same way.

    Attributes:
        networks, choices: what is searched.
        alpha: percent of the candidates, best outlook first, among which balanced speedup decides.
        beta, samples: number of rounds, and of candidates per round.
        finetune: see :data:`~wsp_compiler.abwsp.finetuning.Finetune`.
        refit: see :func:`wsp_compiler.search`.
        seed: of all that is drawn.
        state, folder: what is known, and where it is kept.
        on_step: called with a text before each candidate and each fine-tuning.
    """

    networks: Networks
    choices: Choices
    alpha: float
    beta: int
    samples: int
    finetune: Finetune
    refit: str | bool
    seed: int
    ranks: Ranks
    state: SearchState
    folder: StateFolder
    on_step: OnStep = nothing
    _best: tuple[int, PruningPlan, nn.Module] | None = field(default=None, init=False)

    def run(self) -> SearchResult:
        """All rounds that are left, and the result."""
        layers = len(self.choices.layers)
        for index in range(len(self.state.rounds), self.beta):
            used = [entry.winner for entry in self.state.rounds]
            sample = draw(layers, self.samples, self.seed, index, used)
            if not sample:  # every assignment has won a round
                break
            self._judge(sample, index)
            winner = pick_winner(sample, self.state.outlooks, self.choices.total_speedup, self.alpha)
            self._finish(winner, index)
        return self._result()

    def _judge(self, sample: Sequence[str], index: int) -> None:
        """Outlook accuracy of what is not known yet; the ranks take turns."""
        pending = [name for name in sample if name not in self.state.outlooks]
        size = self.ranks.size
        for first in range(0, len(pending), size):
            turn = pending[first : first + size]
            self.on_step(
                f"round {index + 1}: candidate {len(sample) - len(pending) + first + 1} of {len(sample)}"
            )

            def work(turn: Sequence[str] = turn) -> float | None:
                if self.ranks.rank >= len(turn):
                    return None
                name = turn[self.ranks.rank]
                with seeded(self.seed, "outlook", name):
                    return self.networks.outlook(self.choices, name, self.refit == "candidates")

            for name, value in zip(turn, self.ranks.all(work), strict=False):
                assert value is not None
                self.state.outlooks[name] = value
                self.state.sampled[name] = index
            self._save()

    def _finish(self, winner: str, index: int) -> None:
        """Fine-tune and evaluate the winner of a round; keep it if it is the best so far."""
        self.on_step(
            f"round {index + 1}: {'refit' if self.finetune is None else 'fine-tuning'} of the winner"
        )
        with seeded(self.seed, "winner", index):
            plan = self.ranks.first(lambda: self._plan(winner))
            module = self.networks.build(plan)
            checkpoint = self.folder.checkpoint(index, self.ranks.size)
            module = run_finetune(self.finetune, module, self.ranks, checkpoint)
        with seeded(self.seed, "accuracy", index):  # whether or not the training was done already
            what = f"the winner of round {index + 1}"
            accuracy = self.ranks.first(lambda: self.networks.accuracy(module, what))
        self.state.rounds.append(Round(winner, accuracy))
        best = self.best_round()
        if best == index:
            self._best = (index, plan, module)
        if self.ranks.rank == 0:
            if best == index:
                self.folder.save_network(index, plan, module)
            self._save()
            self.folder.drop_networks(keep=best)

    def _plan(self, assignment: str) -> PruningPlan:
        plan = self.choices.plan(assignment)
        return self.networks.refitted(plan) if self.refit else self.networks.adapted(plan)[0]

    def _save(self) -> None:
        if self.ranks.rank == 0:
            self.folder.save(self.state)

    def best_round(self) -> int:
        """Index of the round with the best accuracy; of equals the faster one, then the earlier one."""
        rounds = self.state.rounds

        def order(index: int) -> tuple[float, float, int]:
            return rounds[index].accuracy, self.choices.total_speedup(rounds[index].winner), -index

        return max(range(len(rounds)), key=order)

    def _result(self) -> SearchResult:
        won = {entry.winner: index for index, entry in enumerate(self.state.rounds)}
        found: dict[str, Candidate] = {}
        for name in sorted(self.state.outlooks, key=lambda name: (-self.state.outlooks[name], name)):
            index = won.get(name)
            found[name] = Candidate(
                self.choices.methods(name),
                self.state.outlooks[name],
                self.choices.total_speedup(name),
                self.state.sampled[name],
                index,
                None if index is None else self.state.rounds[index].accuracy,
            )
        best = self.best_round()
        if self._best is None or self._best[0] != best:  # of an earlier run
            plan = self.ranks.first(lambda: self.folder.load_plan(f"round-{best}"))
            module = self.networks.build(plan)
            self.ranks.first(lambda: self.folder.load_weights(best, module))
            self.ranks.synchronise(module)
        else:
            _, plan, module = self._best
        winner = found[self.state.rounds[best].winner]
        return SearchResult(
            plan, module, winner, tuple(found.values()), self.state.dense_accuracy, self.choices.times
        )


def pick_winner(
    sample: Sequence[str],
    outlooks: Mapping[str, float],
    speedup: Callable[[str], float],
    alpha: float,
) -> str:
    """The largest total balanced speedup within the top ``alpha`` % of the sample by outlook accuracy.

    At least one candidate is within; equals of the last one within are, too. Of equal speedups the better outlook
    wins, then the assignment that comes first.
    """
    count = max(1, math.ceil(alpha / 100 * len(sample) - 1e-9))
    bar = sorted((outlooks[name] for name in sample), reverse=True)[count - 1]
    top = [name for name in sorted(sample) if outlooks[name] >= bar]
    return max(top, key=lambda name: (speedup(name), outlooks[name]))

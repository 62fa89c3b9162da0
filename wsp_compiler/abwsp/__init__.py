"""Adaptive Balanced Winograd Structured Pruning: which layers take WSP and which BWSP (ABWSP paper, section 4.3).

| file | what it does |
|---|---|
| `search.py` | search(): arguments, checked |
| `run.py` | the whole, from a model to a SearchResult; what compile() calls |
| `prepare.py` | both uniform plans and each layer's time under both |
| `choices.py` | what lies between the two plans: plans of assignments, total balanced speedup |
| `sampling.py` | which assignments a round looks at |
| `norms.py` | adaptive batch norm |
| `outlook.py` | accuracy of a pruned network before training |
| `rounds.py` | sample, judge, pick a winner, fine-tune it; again |
| `finetuning.py` | the user's training function or the package's loop, data-parallel |
| `ranks.py` | one process or torchrun's |
| `state.py`, `seeds.py` | searches that can be interrupted |
| `result.py` | SearchResult, Spearman's rank correlation |
"""

from __future__ import annotations

from wsp_compiler.abwsp.result import Candidate, SearchResult, spearman
from wsp_compiler.abwsp.search import search

__all__ = ["Candidate", "SearchResult", "search", "spearman"]

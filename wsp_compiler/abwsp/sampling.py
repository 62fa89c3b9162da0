"""Which assignments a round looks at: all that are left, or a Monte Carlo sample (ABWSP paper, section 4.3).

An assignment is a string with one character for every layer that has a choice, in model order: :data:`WSP` or
:data:`BWSP`. ResNet-18 has 13 such layers, hence 8192 assignments; an assignment costs an evaluation of the network.
"""

from __future__ import annotations

import random
from collections.abc import Collection

WSP, BWSP = "0", "1"


def draw(layers: int, samples: int, seed: int, round_index: int, used: Collection[str]) -> list[str]:
    """Distinct assignments for one round.

    Args:
        layers: layers that have a choice.
        samples: how many to draw; if no more are left, all of them are returned.
        seed, round_index: the draw depends on both and on nothing else, so that a resumed search draws the same.
        used: assignments that are out: winners of earlier rounds.

    Returns:
        At most ``samples`` assignments; empty if none is left. Those of the first round begin with all layers
        WSP and all of them BWSP, between which the others lie.
    """
    left = 2**layers - len(used)
    if left <= samples:
        everything = (assignment(number, layers) for number in range(2**layers))
        return [found for found in everything if found not in used]
    generator = random.Random(f"{seed}/{round_index}")
    ends = (WSP * layers, BWSP * layers) if round_index == 0 and samples >= 2 else ()
    drawn = dict.fromkeys(end for end in ends if end not in used)
    while len(drawn) < samples:
        found = assignment(generator.getrandbits(layers), layers)
        if found not in used:
            drawn[found] = None
    return list(drawn)


def assignment(number: int, layers: int) -> str:
    """The assignment with the binary digits of ``number``; without layers the empty one."""
    return f"{number:0{layers}b}" if layers else ""

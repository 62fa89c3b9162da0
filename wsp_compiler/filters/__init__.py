"""Physical filter pruning: channels whose filters are pruned leave the network, with everything that reads them.

| file | what it does |
|---|---|
| `operations.py` | what a node of a graph does to the channels of images |
| `coupling.py` | which channels have to stay or go together (a networkx graph over filters) |
| `constants.py` | what channels of pruned filters still emit: a constant each |
| `removal.py` | which channels go, given a plan, and which one stands for the constants of the others |
| `narrow.py` | smaller copies of modules |
| `shrink.py` | the graphs and the plan without those channels |
| `feature_ranks.py` | ranks of feature maps on calibration data (criterion HRank) |
| `settle.py` | the plan's part: filters that are tied are chosen together, and how what is left of a layer runs |
"""

"""Experiments on what pruning costs in accuracy: training, pruning, fine-tuning, figures.

| file | what it does |
|---|---|
| `tasks.py` | labelled images with fixed splits: digits that a package ships, CIFAR-10, a folder of classes |
| `distortion.py` | makes small digits hard: pose, clutter, colour, noise |
| `models.py` | CIFAR-style ResNet-20, 32, 56 and VGG-16 |
| `training.py` | one training loop for dense and pruned networks; CUDA graphs, checkpoints |
| `outlook.py` | accuracy, and batch-norm re-estimation before it ("outlook accuracy") |
| `methods.py` | the pruning methods by name, as trainable networks |
| `experiments.py` | the list of jobs, most important first, and how one job runs |
| `workers.py`, `run.py` | jobs side by side in processes within a time budget: `python -m benchmarks.accuracy.run` |
| `summary.py`, `figures.py` | tables and PNGs from the record |
| `speed.py` | times of the fine-tuned networks: `python -m benchmarks.accuracy.speed` |
| `one_plan.py` | accuracy and speed of one and the same plan: `python -m benchmarks.accuracy.one_plan` |
"""

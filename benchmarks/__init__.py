"""Benchmarks of compiled networks against the vendors' libraries; run as modules from the repository root.

    python -m benchmarks.conv_layers --device cuda --dtype fp16 --cases twelve
    python -m benchmarks.networks --device cuda --dtype fp16 --networks resnet18 vgg16 --batch 1 32

Times are microseconds of one call, medians over interleaved rounds; ratios are (their time) / (our time), so
above 1 means that we are faster. Each run measures its own baselines: compare numbers within one run only.
"""

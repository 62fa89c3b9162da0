"""Budgets: how far each layer is pruned, with which pattern and tile, under one limit for the whole network."""

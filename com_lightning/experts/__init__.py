"""Experts in, from whatever they are: checkpoints, state dicts, folders, adapters, modules."""

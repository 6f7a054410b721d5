"""Looks inside a model with functional transforms: pure functions over (params, state, batch, cfg) and a key."""

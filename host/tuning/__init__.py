"""Tuning: train the routers of a model, and small changes of its weights, so that tokens skip what they can miss."""

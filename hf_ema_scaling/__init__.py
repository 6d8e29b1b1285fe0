"""Tune once at a small reference batch; run at any batch; teach with the average of the weights."""

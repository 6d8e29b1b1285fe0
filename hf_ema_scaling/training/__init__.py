"""Trainers and the callback: the two doors."""

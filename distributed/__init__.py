"""Devices, ranks, and what is wrapped around a model."""

"""Measurements behind the defaults; nothing here is needed to convert or to serve."""

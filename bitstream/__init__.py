"""Boards and vendor flows."""

"""Measurements. Not collected by pytest."""

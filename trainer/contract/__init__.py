"""Requests, answers and errors. Only pydantic, no I/O."""

"""What goes in and out: requests, answers, errors. pydantic alone, no I/O."""

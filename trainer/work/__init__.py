"""One thread that runs one job at a time, and the wiring of the whole app."""

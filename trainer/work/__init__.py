"""The worker thread, which runs one job at a time; and the assembly of the app."""

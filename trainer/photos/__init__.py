"""From uploaded files to photos that were analyzed; the networks run in a child process."""

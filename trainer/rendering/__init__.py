"""From a prompt to pictures. Imports torch."""

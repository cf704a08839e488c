"""From photos to a trained model: dataset, loop, states, checks. Imports torch."""

"""Where images come from, how they are augmented, and the batches of the loop."""

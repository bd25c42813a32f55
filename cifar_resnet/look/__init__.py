"""What a model gets wrong, drawn and printed."""

"""The path that the product exists for: model, optimizer, step, loop, and where these run."""

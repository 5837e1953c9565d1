"""Model families: config.json to module, checkpoint to weights."""

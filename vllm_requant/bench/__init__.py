"""How fast and how reliably a checkpoint is served beside others: what `requant bench`, `load` and `soak` run."""

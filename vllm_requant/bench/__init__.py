"""How fast a checkpoint is served, beside its peers on the same machine: what ``requant bench`` runs."""

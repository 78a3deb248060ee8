"""What the recipes share: one running stage from its directory to its lineage, and what each recipe adds."""

"""What the recipes share: one running stage, from its run directory to its lineage, and what each recipe adds."""

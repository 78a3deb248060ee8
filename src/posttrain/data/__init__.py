"""Rows: read from files and hub datasets, and converted to the columns that trainers read."""

"""Rows: from files and hub ids to the columns that trainers read."""

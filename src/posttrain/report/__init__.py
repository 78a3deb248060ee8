"""What people read about a chain: an HTML page, a live view, and dashboards."""

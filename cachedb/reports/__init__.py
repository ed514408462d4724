"""What people ask of a cache: totals, named questions, sessions, the HTML page."""

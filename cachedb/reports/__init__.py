"""Report on a cache: totals, named reports, sessions, the HTML page."""

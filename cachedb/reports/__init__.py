"""Report on a cache: disk usage, named reports, views, sessions and the HTML page."""

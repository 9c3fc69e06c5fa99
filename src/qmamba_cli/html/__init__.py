"""Self-contained HTML pages and inline SVG charts: pure functions from data to text."""

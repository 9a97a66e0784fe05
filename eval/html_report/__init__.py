"""The report: tables, charts and figures in one HTML file."""

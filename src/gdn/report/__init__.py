"""One self-contained HTML page per run: scales, figures, style and the page itself."""

"""Figures in one quiet style, as PNG files or as SVG that takes on the colours of the page. Imports no torch."""

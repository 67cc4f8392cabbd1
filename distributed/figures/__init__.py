"""Figures in one style, as PNG files or as SVG that adopts a page's colours. Imports no torch."""

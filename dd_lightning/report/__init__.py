"""Runs beside the paper: tables, figures and one page."""

"""The report: one self-contained HTML page for runs or a study. `page` writes it."""

"""Read the record and show it as tables, plots and pages; never imports torch."""

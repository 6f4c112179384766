"""The configuration of a study, read, merged, checked and written."""

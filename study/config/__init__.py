"""What a study is told: its configuration, read, merged, checked and written."""

"""Fine-tune one image classifier; knows nothing of studies, databases or reports."""

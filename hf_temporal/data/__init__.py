"""Data for the recipes: docstrings, the embedded model, summarization, metrics. Knows neither trainer nor recipes."""

"""The paper's laboratory: what a model remembers, and what t^p does to it. Knows neither trainer nor recipes."""

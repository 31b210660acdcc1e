"""The paper's laboratory: memory functions, model families, probes of what they remember. Knows no trainer."""

"""What the trainer has to know of a model: its own loss (`model_loss`), and its LM head (`fused_head`)."""

"""Evaluation: a packed or plain checkpoint in, perplexity, tasks and a report out."""

"""FLOPs, memory and cache of answering a question, computed from the models' sizes. Builds no weights."""

"""Speed and memory of LLaVA, VLoRA and the plain language model, measured side by side in one run."""

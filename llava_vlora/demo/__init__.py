"""The demo: train LLaVA and VLoRA side by side on SceneQA, answer, measure, report."""

"""What a long training run needs beside its arithmetic; knows nothing of LLaVA."""

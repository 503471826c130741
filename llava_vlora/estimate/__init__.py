"""What training needs, computed from the models' sizes: parameters, memory of a GPU, hours. Builds no weights."""

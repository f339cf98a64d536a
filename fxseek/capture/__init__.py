"""From a call of the model to a captured graph, and the compiled step in its place."""

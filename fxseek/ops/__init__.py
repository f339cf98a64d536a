"""What the graphs of a step call. Nothing here knows a graph, a model or a configuration."""

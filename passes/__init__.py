"""FX → FX passes of fxseek: functionalise, normalise, token facts, ditch.

Each pass takes a graph (and facts) and returns a new one; none edits its input. Nothing in
here knows a model family: nodes are found by operation, fact or metadata.
"""
